"""Compares what is written with the merged model: on the example inputs, and on others of the same shapes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import FxMergeError, first_line
from fxmerge.graph.compare import in_pieces, squared
from fxmerge.graph.eval_mode import evaluating, reproducible
from fxmerge.graph.nested import fresh, tree
from fxmerge.graph.outputs import foreign
from fxmerge.ir.capture import Capture

_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}  # accepted relative error by dtype; 1e-5 for others
_LEAST = 1e-3  # a tensor's error is measured against at least this share of the largest tensor's mean square root

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the positional and keyword arguments of a call
Values = list[Tensor]


def run(module: Callable[..., Any], call: Call, seed: int = 0) -> Values:
    """All tensors that a model returns, in order, in evaluation mode. Its buffers are restored."""
    args, kwargs = call
    modules = [module] if isinstance(module, nn.Module) else []
    with torch.no_grad(), evaluating(*modules), _buffers_kept(*modules), reproducible():
        torch.default_generator.manual_seed(seed)
        out = module(*fresh(list(args)), **fresh(dict(kwargs)))
    foreign(out)
    return [leaf.detach() for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _buffers_kept(*modules: nn.Module) -> Iterator[None]:
    """Restores the buffers that a run writes, such as counters and caches."""
    held = [(owner._buffers, dict(owner._buffers)) for module in modules for owner in nn.Module.modules(module)]
    values = [value for _, buffers in held for value in buffers.values() if value is not None]
    before = [(value, value._version, value.detach().clone()) for value in values]
    try:
        yield
    finally:
        for own, buffers in held:
            own.update(buffers)
        for value, version, copied in before:
            if value._version != version:
                value.copy_(copied)


class Expected:
    """What a merged model returns, to be compared with what is written.

    Each call of `calls` is run once: the example inputs, and the same values in another order if the model takes them.
    """

    def __init__(self, captured: Capture, module: nn.Module) -> None:
        self.name = type(captured.model or module).__name__
        example = _placed((captured.args, dict(captured.kwargs)), module)
        try:
            self.calls = [(example, run(module, example))]
        except Exception as error:
            raise FxMergeError(
                f"result.module does not run on the example inputs ({type(error).__name__}: {first_line(error)}), so "
                "that what is written cannot be compared with it; write it before its dtype or its code is changed"
            ) from error
        _check_code(module, example, self.calls[0][1])
        other = tree(_reordered, example)
        with contextlib.suppress(Exception):  # a model may demand an order: of offsets, or of positions
            self.calls.append((other, run(module, other)))

    def error(self, given: Callable[..., Any], calls: int | None = None) -> float:
        """The largest relative error of a model's outputs in these calls, as a share of the accepted one.

        calls: how many of the calls to run; by default all of them. Raises whatever the model raises.
        """
        return max(difference(values, run(given, call)) / bound(values) for call, values in self.calls[:calls])

    def confirm(self, given: Callable[..., Any], what: str, slack: float = 0.0) -> None:
        """Raises FxMergeError, naming `what`, if a model does not run or does not return what the merged model does.

        slack: a relative error that is accepted too, for a model that another library runs. Integers are then not
            compared, since an index among equal values may differ.
        """
        for call, values in self.calls:
            try:
                found = run(given, call)
            except Exception as raised:
                raise FxMergeError(f"{what} does not run: {type(raised).__name__}: {first_line(raised)}") from raised
            error = difference(values, found, integers=not slack)
            if not error <= max(bound(values), slack):
                raise FxMergeError(
                    f"{what} does not return what result.module returns (relative error {error:.2g}), so it is not "
                    "written; please report this model"
                )

    def is_random(self, module: nn.Module) -> bool:
        """Whether the merged model returns other values for another seed."""
        call, values = self.calls[0]
        return difference(values, run(module, call, seed=1)) > bound(values)


def bound(values: Values) -> float:
    """The relative error of outputs that is accepted."""
    return max((_CLOSE.get(t.dtype, 1e-5) for t in values), default=1e-5)


def difference(one: Values, other: Values, integers: bool = True) -> float:
    """The largest relative error of any tensor; infinite where shapes or dtypes differ, or other values are not finite.

    integers: whether to compare integers too; their error is the share of values that differ
    """
    if [(t.shape, t.dtype) for t in one] != [(t.shape, t.dtype) for t in other]:
        return float("inf")
    scale = max((_size(t) / max(t.numel(), 1) ** 0.5 for t in one), default=0.0)
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if integers or _is_float(a)]
    return max((_error(a, b, scale) for a, b in pairs), default=0.0)


def _error(one: Tensor, other: Tensor, scale: float) -> float:
    other = other.to(one.device)
    if not _is_float(one):
        return float((one != other).double().mean()) if one.numel() else 0.0
    apart = 0.0
    for own, made in in_pieces(one, other):
        odd = ~torch.isfinite(own)
        if not bool(((own == made) | (own.isnan() & made.isnan()))[odd].all()):
            return float("inf")
        apart += squared((own - made)[~odd])
    least = max(_LEAST * scale * one.numel() ** 0.5, 1e-300)
    found = sqrt(apart) / max(_size(one), least)
    return found if found == found else float("inf")


def _size(value: Tensor) -> float:
    """The norm of a tensor's finite values; 0 for integers."""
    if not _is_float(value):
        return 0.0
    return sqrt(sum(squared(own[torch.isfinite(own)]) for (own,) in in_pieces(value)))


def _is_float(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _placed(call: Call, module: nn.Module) -> Call:
    """The arguments on the device of the module, which may have been moved since the merge."""
    place = next((v.device for v in [*module.parameters(), *module.buffers()]), None)
    moved: Call = tree(lambda v: v.to(place) if isinstance(v, Tensor) else v, call)
    return moved


def _reordered(value: Any) -> Any:
    """A tensor's values in the opposite order, which are of the same kind and in the same range."""
    if not isinstance(value, Tensor):
        return value
    other = value.flatten().flip(0).reshape(value.shape)
    return 0.75 * value if value.is_floating_point() and torch.equal(other, value) else other


def _check_code(module: nn.Module, example: Call, values: Values) -> None:
    """Raises FxMergeError if a graph was edited after its code was made, and the code computes something else."""
    graphs = [(path, m) for path, m in module.named_modules() if isinstance(m, fx.GraphModule)]
    stale = [path for path, m in graphs if m.code != m.graph.python_code("self").src]
    if not stale:
        return
    copied = copy.deepcopy(module, {id(t): t for t in [*module.parameters(), *module.buffers()]})
    for path in stale:
        copied.get_submodule(path).recompile()  # type: ignore[operator]
    if difference(values, run(copied, example)) > bound(values):
        name = f"result.module.{stale[0]}".rstrip(".")
        raise FxMergeError(
            f"the graph of {name} was edited after its code was made, and the two compute different outputs; call "
            f"{name}.recompile()"
        )
