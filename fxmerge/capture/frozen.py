"""Finds what tracing froze: a value of one run that became a constant of the graph.

The code of a module that is a leaf of the graph does not run while the model is traced, nor do its hooks. What they
store (features collected by forward hooks, say) is then a value of an earlier run, and the graph returns the model's
outputs on the example inputs only. So a graph in which something can have been frozen is compared with the model on
other inputs.

The model for these comparisons is the user's own, not the copy that was traced: a copy that shares state with the
original, in a way that nothing here knows of, differs from it on other inputs.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError, source_line
from fxmerge.graph.eval_mode import evaluating, put_back, reseed, state_of
from fxmerge.graph.inputs import is_exported, other_sizes, other_values
from fxmerge.graph.nested import fresh, leaves
from fxmerge.graph.outputs import agree, plain, returned

Check = Callable[[fx.GraphModule], None]


def checks(
    original: nn.Module, copied: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stateful: bool = False
) -> Check:
    """A function that raises FxMergeError for a graph of the model in which a value of an earlier run is a constant.

    original: the user's model; it runs on other inputs, and its state is restored
    copied: the copy that was traced
    stateful: forward keeps tensors in attributes; it is then run on further inputs first
    """

    def check(traced: fx.GraphModule) -> None:
        _refuse_generators(traced)
        found = suspects(traced, copied)
        found += ["its forward keeps tensors from call to call"] if stateful else []
        if not found and not is_exported(traced):
            return
        values = other_values((tuple(args), dict(kwargs)))
        for inputs in (values, *(() if is_exported(traced) else other_sizes(values))):
            if not _agree(original, traced, inputs, other_values(values) if stateful else None):
                raise FxMergeError(
                    f"the graph of {type(original).__name__} returns what the model returns on the example inputs, but "
                    f"not on others; {found[0] if found else 'it has a value of the example run as a constant'}; let "
                    "forward pass on what it computes (return features, not collect them with hooks), and keep no "
                    "state from call to call"
                )

    return check


def unchecked(traced: fx.GraphModule) -> None:
    """A check that passes: for models without values, whose outputs cannot be compared."""


def _agree(original: nn.Module, traced: fx.GraphModule, inputs: Any, earlier: Any) -> bool:
    """Whether both return the same. True where either does not run, since that is no silent difference.

    earlier: the (args, kwargs) of a call of the original that comes first, or None
    """
    args, kwargs = inputs
    try:
        with evaluating(original), restored(original), eager():
            if earlier is not None:
                original(*fresh(earlier[0]), **fresh(earlier[1]))
            reseed()
            expected = returned(plain(original(*fresh(args), **fresh(kwargs))))
    except Exception:  # the user's code may raise anything on inputs that it was not written for
        return True
    try:
        reseed()
        actual = returned(traced(*fresh(args), **fresh(kwargs)))
    except Exception:
        return True
    return agree(expected, actual, 1e-4)


def suspects(traced: fx.GraphModule, copied: nn.Module) -> list[str]:
    """What can have been frozen in a graph that torch.fx traced, as clauses of a message.

    These are constants that are neither parameters nor buffers, and hooks. Where there are none, all values that the
    graph uses come from its inputs and parameters.
    """
    known = {id(t) for m in nn.Module.modules(traced) for t in [*m._parameters.values(), *m._buffers.values()]}
    found = []
    for node in traced.graph.nodes:
        if node.op == "get_attr" and _constant(traced, str(node.target), known):
            user = next(iter(node.users), node)
            line = source_line(node) or source_line(user)
            found.append(f"{user.name} uses a tensor that is a constant of the graph ({line or node.target})")
    for path, module in copied.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        found += [f"{path or 'the model'} has a hook ({getattr(h, '__qualname__', type(h).__name__)})" for h in hooks]
    shared = torch.nn.modules.module
    if shared._global_forward_hooks or shared._global_forward_pre_hooks:
        found.append("a hook is registered for all modules")
    return found


def _constant(traced: fx.GraphModule, path: str, known: set[int]) -> bool:
    """Whether a path leads to a tensor that is neither a parameter nor a buffer of the model."""
    value, name = _at(traced, path), path.rpartition(".")[2]
    made = name.startswith(("_tensor_constant", "lifted_tensor"))  # torch registers these as buffers of the graph
    return isinstance(value, Tensor) and (made or id(value) not in known)


def _at(traced: fx.GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(traced.get_submodule(owner), name, None)


def _refuse_generators(traced: fx.GraphModule) -> None:
    """Raises FxMergeError for a graph that draws from a torch.Generator: it would be the same one in all calls."""
    for node in traced.graph.nodes:
        held = [node.args, node.kwargs] if node.op != "get_attr" else [_at(traced, str(node.target))]
        if any(isinstance(leaf, torch.Generator) for leaf in leaves(held)):
            node = next(iter(node.users), node) if node.op == "get_attr" else node
            raise FxMergeError(
                f"{node.name} draws random numbers from a torch.Generator ({source_line(node) or 'unknown line'}), "
                "whose state a graph cannot follow; make the numbers in __init__ and register them as a buffer"
            )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restores the buffers, the plain attributes and the hooks of a model's modules on exit."""
    before = state_of(model, whole=True)
    buffers = (b for m in nn.Module.modules(model) for b in m._buffers.values())
    values = {id(b): (b, b.clone(), _version(b)) for b in buffers if b is not None}
    try:
        yield
    finally:
        for buffer, value, version in values.values():
            if _version(buffer) != version or version is None:
                buffer.copy_(value)
        put_back(before)


def _version(value: Tensor) -> int | None:
    """A number that increases whenever a tensor is written in place; None for a tensor that does not count writes."""
    return None if value.is_inference() else value._version


@contextmanager
def eager() -> Iterator[None]:
    """Runs what torch.compile wrapped without compiling it."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def draws() -> Any:
    """A record of the states of all global generators of random numbers; it changes when numbers are drawn."""
    numpy = sys.modules.get("numpy")
    drawn = [torch.default_generator.get_state().tolist(), random.getstate()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        drawn.append([torch.cuda.get_rng_state(i).tolist() for i in range(torch.cuda.device_count())])
    return [*drawn, *([numpy.random.get_state()[1].tolist()] if numpy is not None else [])]
