"""Exports models with torch.export, for those that symbolic tracing cannot follow or leaves with opaque calls.

Graphs consist of aten ops. Parameters keep the user's names. The batch size is dynamic where the model allows it.
Every other size is a literal, so that the merged model accepts inputs of the example's shape only, except where no call
depends on that size (fully convolutional networks). Assertions in the graph say so (`guards.py`). The literals that
depend on widths are recomputed by `analysis/literal_sizes.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import keyword
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from fxmerge.capture.guards import insert, only_samples, sizes_of
from fxmerge.errors import FxMergeError, first_line
from fxmerge.graph.inputs import bind
from fxmerge.graph.nested import fresh
from fxmerge.graph.ops import overload_name


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The model as a graph module of aten ops with the model's call signature. Raises whatever torch.export raises."""
    with silence(), torch.no_grad():
        found = export_any_batch(model, args, kwargs)
        return found or graph_module_of(torch.export.export(model, args, kwargs, strict=False))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppresses the logs, warnings and prints of torch.export; its exceptions say what failed."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
        with quiet[0], quiet[1], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def graph_module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a graph module with its call signature, and with assertions on the sizes of its inputs."""
    module = _graph_module_of(program)
    insert(module, sizes_of(program), smallest=1)
    return module


def _graph_module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a graph module with its call signature, without guards and assertions."""
    # newer versions of torch add guards to the graph by default, which can take as long as the export
    plain: Any = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    try:
        module = program.module(**plain)
    except SyntaxError as error:  # torch writes self.lambda
        names = {part for name in program.state_dict for part in name.split(".") if keyword.iskeyword(part)}
        raise FxMergeError(
            f"torch.export cannot make a module of this program ({first_line(error)}), since names of its modules or "
            f"parameters are keywords of Python: {', '.join(sorted(names))}; give the model itself, or rename them"
        ) from error
    assert isinstance(module, fx.GraphModule)
    module._forward_pre_hooks.clear()  # these hooks check the shapes of inputs as well
    module._forward_pre_hooks_with_kwargs.clear()
    remove_guards(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    for owner in module.modules():  # an exported module's .train() and .eval() raise; `EvaluationModule` replaces them
        owner.__dict__.pop("train", None)
        owner.__dict__.pop("eval", None)
    return module


_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg)


def remove_guards(module: fx.GraphModule) -> None:
    """Removes guards and assertions on inputs, in place; the merged model is compared with the original instead."""
    for node in list(module.graph.nodes):
        if (node.op == "call_module" and "_guards" in str(node.target)) or node.target in _ASSERTIONS:
            module.graph.erase_node(node)
    for name, _ in list(module.named_children()):
        if "_guards" in name:
            delattr(module, name)


def export_any_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule | None:
    """The exported model with a dynamic batch size, or None where the batch size cannot be dynamic.

    The batch is the first axis of the tensors. A batch of 1 is doubled for the export, as torch.export takes a size of
    1 as a constant. The result must return what the model returns on the example.
    Raises GuardOnDataDependentSymNode where control flow depends on values.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    sizes = {t.size(0) for t in given if t.dim()}
    traced_args, traced_kwargs = tree_map(_doubled, (args, kwargs)) if sizes == {1} else (args, kwargs)
    named = dict(inspect.signature(model.forward).bind(*traced_args, **traced_kwargs).arguments)

    def exported(axes: Callable[[Tensor], Iterable[int]]) -> torch.export.ExportedProgram:
        def free(value: Any) -> Any:
            return (
                dict.fromkeys(axes(value), torch.export.Dim.AUTO) if isinstance(value, Tensor) and value.dim() else None
            )

        shapes = tree_map(free, named)
        return torch.export.export(model, traced_args, traced_kwargs, dynamic_shapes=shapes, strict=False)

    def alike(module: fx.GraphModule, args: Any, kwargs: Any) -> bool:
        before, after = (tree_leaves(m(*fresh(args), **fresh(kwargs))) for m in (model, module))
        return len(before) == len(after) and all(map(_agree, before, after))

    try:
        program = exported(lambda v: (0,))
        module = _graph_module_of(program)
        if not alike(module, args, kwargs):
            return None
    except GuardOnDataDependentSymNode:  # a static batch size would not help
        raise
    except Exception:  # torch.export raises many types; the batch size is then a constant
        return None
    found = sizes_of(program)
    with contextlib.suppress(Exception):  # the other sizes are then constants
        if not _computes_sizes(module):
            free = exported(lambda v: range(v.dim()))
            if only_samples(free) and _calls(_graph_module_of(free)) == _calls(module):
                found = sizes_of(free)
    one, proved = 2, [(args, kwargs)]
    with contextlib.suppress(Exception):
        single = tree_map(_first, (args, kwargs))
        if alike(module, *single):
            one, proved = 1, [*proved, single]
    insert(module, found, one, [bind(module, *inputs) for inputs in proved])
    return module


_SIZED = {"view", "reshape", "expand", "arange", "full", "zeros", "ones", "unflatten", "repeat", "_unsafe_view"}


def _computes_sizes(module: fx.GraphModule) -> bool:
    """Whether a graph has calls that take sizes, so that no other size of its inputs is likely to fit."""
    return any(overload_name(node.target) in _SIZED for node in module.graph.nodes)


def _calls(module: fx.GraphModule) -> list[Any]:
    """The calls of a graph with their arguments, for comparison with those of another graph."""
    return [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in module.graph.nodes]


def _agree(one: Any, other: Any) -> bool:
    """Returns whether two outputs agree: tensors in shape and, up to rounding, in values; anything else always."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    if isinstance(other, FakeTensor):  # from a model on the meta device: a shape without values
        return one.shape == other.shape
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def _first(value: Any) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.dim() else value


def _doubled(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value
