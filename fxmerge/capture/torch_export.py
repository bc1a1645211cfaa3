"""Exporting: the graphs of torch.export (aten ops), for what symbolic tracing cannot reach or leaves hidden.

Parameters keep the user's names. The number of samples is left open where the model allows it; every other size is a
literal, so the merged model takes inputs of the example's shape. `constants.py` recomputes those that depend on widths.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from fxmerge.graph.nested import fresh


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The model as a graph module of aten ops, with the model's own call signature. Raises what torch.export raises."""
    with silence(), torch.no_grad():
        found = of_any_batch(model, args, kwargs)
        return found or opened(torch.export.export(model, args, kwargs, strict=False))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What torch.export cannot do comes back as an exception, not as pages of text."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
        with quiet[0], quiet[1], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def opened(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a graph module with its call signature, without guards and assertions."""
    # newer versions of torch write guards into the graph unless told not to, which can take as long as the export
    plain: Any = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    module = program.module(**plain)
    assert isinstance(module, fx.GraphModule)
    module._forward_pre_hooks.clear()  # they check the inputs' shapes too
    module._forward_pre_hooks_with_kwargs.clear()
    unguarded(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    for owner in module.modules():  # .train() and .eval() of an exported module raise; the graph is that of eval
        owner.__dict__.pop("train", None)
        owner.__dict__.pop("eval", None)
    return module


def unguarded(module: fx.GraphModule) -> None:
    """Take out guards on the inputs' shapes: the merged model is checked against the original instead."""
    for node in list(module.graph.nodes):
        if (node.op == "call_module" and "_guards" in str(node.target)) or node.target in _ASSERTIONS:
            module.graph.erase_node(node)
    for name, _ in list(module.named_children()):
        if "_guards" in name:
            delattr(module, name)


def of_any_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule | None:
    """The exported model for any number of samples, or None where that cannot be left open.

    The samples are what all tensors have as many of, on their first axis. A single one is doubled for the export,
    which takes a size of 1 for a constant. What comes out must give what the model gives on the very example.
    Raises GuardOnDataDependentSymNode where the model's path depends on values.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    sizes = {t.size(0) for t in given if t.dim()}
    if len(sizes) != 1 or not all(t.dim() for t in given):
        return None
    traced_args, traced_kwargs = tree_map(_doubled, (args, kwargs)) if sizes == {1} else (args, kwargs)
    named = dict(inspect.signature(model.forward).bind(*traced_args, **traced_kwargs).arguments)
    shapes = tree_map(lambda v: {0: torch.export.Dim.AUTO} if isinstance(v, Tensor) else None, named)
    try:
        program = torch.export.export(model, traced_args, traced_kwargs, dynamic_shapes=shapes, strict=False)
        module = opened(program)
        before, after = (tree_leaves(m(*fresh(args), **fresh(kwargs))) for m in (model, module))
    except GuardOnDataDependentSymNode:  # what values decide, no size of the example's does
        raise
    except Exception:  # whatever else torch.export says: the size is then a constant
        return None
    return module if len(before) == len(after) and all(map(_agree, before, after)) else None


def _agree(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    if isinstance(other, FakeTensor):  # of a blank model: a shape without values
        return one.shape == other.shape
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def _doubled(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) else value


_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg)
