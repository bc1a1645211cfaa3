"""Captures a model as a torch.fx graph that keeps the user's names, given example inputs.

A copy of the model is traced in evaluation mode. The model and the graph both run once on the example inputs, so that
the shape of each tensor is known, and so that a graph whose outputs differ from the model's is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.capture.constant_fold import fold
from fxmerge.capture.declared_sizes import Shapes, SizesRefusedError, declared
from fxmerge.capture.frozen import Check, checks, draws, unchecked
from fxmerge.capture.output_cache import OutputCache
from fxmerge.capture.parametrizations import computed_weights, unparametrize
from fxmerge.capture.quantized import check_not_quantized
from fxmerge.capture.record import record
from fxmerge.capture.symbolic import trace
from fxmerge.capture.torch_export import graph_module_of
from fxmerge.capture.training import differs_in_training
from fxmerge.errors import FxMergeError, first_line, source_line
from fxmerge.graph.eval_mode import (
    FlagModule,
    State,
    forgetting,
    moved,
    only_evaluating,
    put_back,
    reproducible,
    reseed,
    state_of,
)
from fxmerge.graph.inputs import bind, is_exported
from fxmerge.graph.nested import fresh, leaves
from fxmerge.graph.outputs import agree, foreign, plain, returned, returning_plain
from fxmerge.ir.capture import Capture, Recorded
from fxmerge.weights.copy import deep_copy, inside
from fxmerge.weights.meta import make_fake
from fxmerge.weights.shards import undivided


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The (args, kwargs) that example inputs stand for: a tensor, a tuple of args, or a dict of kwargs."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    raise FxMergeError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments"
    )


def check_model(model: Any) -> None:
    """Raises FxMergeError for an object that is not a module, for lazy and quantized ones, and for infinite weights."""
    if not isinstance(model, nn.Module):
        hint = "; call it to make an instance first" if isinstance(model, type) else ""
        raise FxMergeError(f"model is a {type(model).__name__}, not a torch.nn.Module{hint}")
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        inner = [name for name, part in model.named_children() if type(part).forward is not nn.Module.forward]
        hint = f"the part that computes, such as .{inner[0]}" if len(inner) == 1 else "a model that can be called"
        raise FxMergeError(f"{type(model).__name__} has no forward of its own; give {hint}")
    check_not_quantized(model)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(value):
            raise FxMergeError(f"{name} has no shape yet (a lazy module); run the model once on an example first")
        # if the sum is finite, so are its terms; a finite tensor may also overflow, hence the slower check below
        odd = (
            value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value.sum(dtype=torch.float32)))
        )
        if not odd:
            continue
        weighs = isinstance(value, nn.Parameter) or name.endswith(("running_mean", "running_var"))
        sound = torch.isfinite(value) if weighs else ~torch.isnan(value)  # masks and bounds may be infinite
        if not bool(sound.all()):
            what = "NaN or infinity" if weighs else "NaN"
            raise FxMergeError(f"{name} holds {what}; a model with such weights cannot be merged")


def capture(model: Any, example_inputs: Any, dynamic_shapes: Any = None) -> Capture:
    """Captures a model, or an ExportedProgram, whose own example inputs are used where none are given.

    dynamic_shapes: the sizes of inputs that vary, as for torch.export.export; None to find out which can

    Raises FxMergeError where the model cannot be captured, does not run on the inputs, or returns other values than the
    captured graph. The message names the module and, where known, the source line.
    """
    program = model if isinstance(model, torch.export.ExportedProgram) else None
    if program is not None:
        model = graph_module_of(program)
    given, model = model, inside(model) if isinstance(model, nn.Module) else model
    sharding = None
    if isinstance(model, nn.Module):
        model, sharding = undivided(model)
        given = given if sharding is None else model
    check_model(model)
    own = program.example_inputs if program is not None and example_inputs is None else None
    args, kwargs = own if own is not None else arguments(example_inputs)
    shapes = None
    if dynamic_shapes is not None:
        if program is not None or (isinstance(model, fx.GraphModule) and is_exported(model)):
            raise FxMergeError("the model has been exported, with dynamic sizes of its own; leave out dynamic_shapes")
        shapes = declared(dynamic_shapes, model, args, kwargs)
    if any(isinstance(v, Tensor) and not v.numel() for v in leaves([args, kwargs])):
        raise FxMergeError("example_inputs contain a tensor without elements; give at least one sample")
    # the copy shares the parameters, which no one writes, but not the buffers, which a forward may update
    traced_model = deep_copy(model, [*model.parameters(), *computed_weights(model)])
    training = {name: m.training for name, m in traced_model.named_modules()}
    for inner in nn.Module.modules(traced_model):  # not by .eval(), which raises on an exported graph module
        if inner.training:
            inner.training = False
    blank = make_fake(traced_model)
    cache = OutputCache()
    with torch.no_grad(), reproducible():
        drawn, state = draws(), state_of(traced_model)
        try:
            with nullcontext() if blank else cache.watching(traced_model):
                expected = traced_model(*fresh(args), **fresh(kwargs))
        except Exception as error:
            raise FxMergeError(
                f"{type(model).__name__} does not run on these example inputs ({_shapes(args, kwargs)}): "
                f"{type(error).__name__}: {first_line(error)}; {_HINTS[blank]}"
            ) from error
        drew = draws() != drawn
        is_random = drew and not agree(returned(expected), returned(traced_model(*fresh(args), **fresh(kwargs))), 1e-6)
        unparametrize(traced_model)
        left_out = foreign(expected)
        if left_out:
            expected, traced_model = plain(expected), returning_plain(traced_model)
        check = unchecked if blank else checks(model, traced_model, args, kwargs, moved(state))

        def compared(*, symbolically: bool) -> tuple[fx.GraphModule, Recorded | None, list[Any], _Recorder]:
            """The graph, what was recorded if it was recorded, its inputs, and its run, compared with the model's."""
            graph, parts = _graph(traced_model, args, kwargs, check, state, shapes, symbolically)
            inputs = list(parts.inputs) if parts else bind(graph, args, kwargs)
            reseed()
            run = _Recorder(graph, cache)
            actual = run.run(*fresh(inputs), enable_io_processing=False)
            if not blank:
                _compare(traced_model, (args, kwargs), expected, actual)
            return graph, parts, inputs, run

        try:
            module, recorded, values, recorder = compared(symbolically=True)
        except UnfaithfulError as refused:  # code may ask whether a value is a tensor, which a proxy of torch.fx is not
            try:
                module, recorded, values, recorder = compared(symbolically=False)
            except FxMergeError:
                raise refused from refused.__cause__
        differs = recorded is None and not is_exported(module) and differs_in_training(traced_model, args, kwargs)
    whole = [*module.named_modules(), *(recorded.host.named_modules() if recorded else ())]
    for name, traced in whole:
        if traced.training != training.get(name, training[""]):
            traced.training = training.get(name, training[""])
    if is_exported(module):
        only_evaluating(module)
    elif differs:
        only_evaluating(module, FlagModule)
    return Capture(
        module=module,
        args=args,
        kwargs=kwargs,
        inputs=tuple(values),
        outputs=() if blank else tuple(returned(expected)),
        shapes=recorder.shapes,
        dtypes=recorder.dtypes,
        devices=recorder.devices,
        recorded=recorded,
        left_out=left_out,
        model=model,
        given=given,
        program=program,
        blank=blank,
        exported=is_exported(module),
        random=is_random,
        dynamic_shapes=shapes,
        sharding=sharding,
    )


_HINTS = {  # whether the model is blank -> what to do when it does not run
    False: "give the inputs that the model's forward takes",
    True: "weights on the meta device have no values; if forward needs values, use fxmerge.on_disk(model, files)",
}


def _graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], check: Check, state: State, shapes: Shapes | None,
    symbolically: bool,
) -> tuple[fx.GraphModule, Recorded | None]:  # fmt: skip
    """The graph of the model: traced, or recorded from one run where the model as a whole cannot be traced.

    state: what forward had kept before the model ran; a recorded model, which stays the user's code, starts from there
    symbolically: as in `trace`
    """
    if moved(state):
        with suppress(FxMergeError), forgetting(model, state):
            return fold(trace(model, fresh(args), fresh(kwargs), check, shapes, symbolically)), None
        reseed()
    try:
        return fold(trace(model, fresh(args), fresh(kwargs), check, shapes, symbolically)), None
    except SizesRefusedError:
        raise
    except FxMergeError as refused:
        reseed()
        put_back(state)
        try:
            recorded = record(model, fresh(args), fresh(kwargs))
        except Exception as error:
            raise FxMergeError(f"{refused} (recording a run failed too: {first_line(error)})") from error
        put_back(state)
        return recorded.module, recorded


def check_weights(captured: Capture) -> None:
    """Raises FxMergeError for a model that can be analyzed, but not merged, as its weights have no values."""
    if captured.blank:
        raise FxMergeError(
            "the weights of this model are on the meta device, without values: it can be analyzed, but to merge it, "
            "load the weights, or give fxmerge.on_disk(model, 'weights.safetensors'), which reads them when needed"
        )


def confined(captured: Capture) -> Capture:
    """A capture of a recorded model that also keeps all channels of the tensors that the user's own code sees."""
    assert captured.recorded is not None
    held = dict.fromkeys(captured.recorded.glue, "is used by code that cannot be rewritten")
    return replace(captured, recorded=replace(captured.recorded, held=held))


class UnfaithfulError(FxMergeError):
    """A graph that does not run on the example inputs, or does not return what the model returns."""


class _Recorder(fx.Interpreter):
    """Runs the graph and notes the shape, dtype and device of each tensor, without keeping the tensors."""

    def __init__(self, module: fx.GraphModule, cache: OutputCache) -> None:
        super().__init__(module)
        self.extra_traceback, self.cache = False, cache
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.devices: dict[str, torch.device] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = self.cache.output(self.fetch_attr(target), args) if not kwargs else None
        return super().call_module(target, args, kwargs) if known is None else known

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            place = f"{n.name} ({n.target}), from {source_line(n) or 'an unknown line'}"
            raise UnfaithfulError(f"the traced graph fails at {place}: {first_line(error)}") from error
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
            self.dtypes[n.name], self.devices[n.name] = value.dtype, value.device
        return value


def _compare(model: nn.Module, given: tuple[Any, Any], expected: Any, actual: Any) -> None:
    """Raises FxMergeError where the outputs of the model and of its graph differ."""
    before, after = returned(expected), returned(actual)
    if agree(before, after, 1e-3):
        return
    name = type(model).__name__
    one, other = (returned(model(*fresh(given[0]), **fresh(given[1]))) for _ in range(2))
    if not agree(one, other, 1e-6):
        raise FxMergeError(
            f"two runs of {name} on the same inputs differ in evaluation mode: it draws random numbers, or keeps state "
            "from call to call; give the noise or the state as an input"
        )
    if [t.dtype for t in before] != [t.dtype for t in after]:
        raise FxMergeError(
            f"{name} returns {before[0].dtype if before else 'nothing'}, but its graph does not: forward changes the "
            "dtype, as torch.autocast does; take torch.autocast out of forward, and use it around the merged model"
        )
    raise UnfaithfulError(
        f"the traced graph of {name} does not return what the model returns on the example inputs; its forward "
        "depends on something that torch.fx cannot see (a global variable, a value, a seed, torch.autocast); give it "
        "as an input or register it as a buffer"
    )


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([*map(show, args), *(f"{k}={show(v)}" for k, v in kwargs.items())])
