"""Exports in which the sizes of the inputs are free as far as the model lets them vary.

`torch.export` finds out which sizes can vary (`Dim.AUTO`). First all sizes are left to it: a language model then takes
any length, a convolutional network any image. Where that fails, or sizes inside the model become long formulas of the
inputs' sizes, only the number of samples is. The graph has to return what the model returns, on the example and in
other sizes; where it raises, by the assertions of `guards`, nothing is wrong.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fxmerge.capture.declared_sizes import Call, Shapes, differs, doubled, refused
from fxmerge.capture.guards import Sizes, insert, sizes_of
from fxmerge.capture.without_rule import without_rule
from fxmerge.graph.eval_mode import reproducible
from fxmerge.graph.inputs import bind, other_sizes
from fxmerge.graph.nested import fresh

# in the formula of a size and in those of all sizes, at most; torch.export may take minutes over longer and more ones
OPERATIONS, ALL_OPERATIONS = 48, 3000

ModuleOf = Callable[[torch.export.ExportedProgram], fx.GraphModule]
Axes = Callable[[Tensor], Iterable[int]]


def with_free_sizes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], module_of: ModuleOf
) -> fx.GraphModule | None:
    """The model exported with all sizes free, or the number of samples (the first axis); None where neither works.

    If calls without a rule are left in the first graph, the one with fewer of them is taken. A batch of 1 is doubled
    for the export, as torch.export takes a size of 1 as a constant.

    module_of: a program as a graph module, without assertions

    Raises GuardOnDataDependentSymNode where control flow depends on values.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    free, call = None, (args, kwargs)
    with contextlib.suppress(Exception), _ShortFormulas():  # torch.export raises many types
        free = _exported(model, call, _free(model, call, lambda v: range(v.dim())), module_of)
        if free is not None and not without_rule(free):
            return free
    try:
        samples = _exported(model, call, _free(model, call, lambda v: (0,)), module_of)
    except GuardOnDataDependentSymNode:  # a constant number of samples would not help
        raise
    except Exception:
        return free
    return min((m for m in (free, samples) if m is not None), key=without_rule, default=None)


def with_declared_sizes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], module_of: ModuleOf, shapes: Shapes
) -> fx.GraphModule:
    """The model exported with the sizes free that are declared so.

    Raises SizesRefusedError where the declaration does not fit the model, and else whatever torch.export raises.
    """
    try:
        found = _exported(model, (args, kwargs), shapes, module_of)
    except Exception as error:
        refusal = refused(error, shapes)
        if refusal is None:
            raise
        raise refusal from error
    if found is None:
        raise differs(type(model).__name__)
    return found


def _free(model: nn.Module, call: Call, axes: Axes) -> Shapes:
    """Sizes of these axes of each tensor that are free as far as torch.export finds that they can be."""

    def free(value: Any) -> Any:
        return dict.fromkeys(axes(value), torch.export.Dim.AUTO) if isinstance(value, Tensor) and value.dim() else None

    found: Shapes = tree_map(free, dict(inspect.signature(model.forward).bind(*call[0], **call[1]).arguments))
    return found


def _exported(model: nn.Module, call: Call, shapes: Shapes, module_of: ModuleOf) -> fx.GraphModule | None:
    """The model exported with these sizes free, and with assertions; None where it returns other values."""
    given, named = doubled(call, model.forward, shapes)
    program = torch.export.export(model, given, named, dynamic_shapes=shapes, strict=False)
    module, found = module_of(program), sizes_of(program)
    if not _alike(model, module, call, if_raised=False):
        return None
    ones, together = _ones(module, call, found, lambda one: _alike(model, module, one, if_raised=False))
    symbols = {symbol for several in ones for symbol in several}
    insert(module, found, symbols, [bind(module, *inputs) for inputs in (call, *ones.values())], together)
    return module if all(_alike(model, module, other, if_raised=True) for other in other_sizes(call)) else None


class _ShortFormulas(TorchFunctionMode):
    """Raises where sizes become too long formulas, one by one or together."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            for size in tensor.shape if isinstance(tensor, FakeTensor) else ():
                length = size.node.expr.count_ops() if isinstance(size, torch.SymInt) else 0
                self.total += length
                if length > OPERATIONS or self.total > ALL_OPERATIONS:
                    raise OverflowError(f"a size of {func} is {size}")
        return made


def _ones(
    module: fx.GraphModule, call: Call, found: Sizes, right: Callable[[Call], bool]
) -> tuple[dict[tuple[str, ...], Call], list[tuple[str, str]]]:
    """The inputs with sizes of 1 on which the graph is right, by symbol; (symbol, other that is 1 if the first one is).

    Inputs that agree in a size, as tokens and their mask, may have a symbol each, and be right as single samples only
    if all of them are.
    """
    values = bind(module, *call)
    places: dict[str, dict[int, list[int]]] = {}  # symbol -> identity of the input -> axes
    sizes: dict[tuple[int, int], list[str]] = {}  # (axis, its size in the example) -> symbols
    for value, shape in zip(values, found.shapes, strict=False):
        for axis, size in enumerate(shape or ()):
            if isinstance(size, str):
                if size not in places:
                    sizes.setdefault((axis, value.size(axis)), []).append(size)
                places.setdefault(size, {}).setdefault(id(value), []).append(axis)

    def single(symbols: Iterable[str]) -> Call:
        def narrowed(value: Any) -> Any:
            for symbol in symbols:
                for axis in places[symbol].get(id(value), ()):
                    value = value.narrow(axis, 0, 1)
            return value

        made: Call = tree_map(narrowed, call)
        return made

    ones: dict[tuple[str, ...], Call] = {(symbol,): one for symbol in places if right(one := single((symbol,)))}
    together = []
    for alike in map(tuple, sizes.values()):
        unproved = [symbol for symbol in alike if (symbol,) not in ones]
        if unproved and len(alike) > 1 and right(one := single(alike)):
            ones[alike] = one
            together += [(symbol, other) for symbol in unproved for other in alike if other != symbol]
    return ones, together


def _alike(model: nn.Module, module: fx.GraphModule, call: Call, if_raised: bool) -> bool:
    """Whether both return the same; `if_raised` where either raises."""
    try:
        before, after = (_outputs(m, call) for m in (model, module))
    except Exception:
        return if_raised
    return len(before) == len(after) and all(map(_agree, before, after))


def _outputs(module: nn.Module, call: Call) -> list[Any]:
    with reproducible():  # a model may draw numbers, such as those of a random mask
        return tree_leaves(module(*fresh(call[0]), **fresh(call[1])))


def _agree(one: Any, other: Any) -> bool:
    """Whether two outputs agree: tensors in shape and, up to rounding, in values; anything else always."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    if isinstance(other, FakeTensor):  # from a model on the meta device: a shape without values
        return one.shape == other.shape
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)
