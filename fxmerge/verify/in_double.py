"""Runs models in float64, so that an error of the analysis cannot be taken for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxmerge.errors import FxMergeError, first_line
from fxmerge.graph.compare import outputs
from fxmerge.graph.eval_mode import quiet
from fxmerge.graph.nested import tree
from fxmerge.ir.capture import Capture
from fxmerge.rewrite.reassemble import assembled
from fxmerge.weights.copy import deep_copy

M = TypeVar("M", bound=nn.Module)
_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_WIDEST = _WIDE | {torch.float16: torch.float64, torch.bfloat16: torch.float64}
_CASTS: dict[Any, Any] = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)


def in_float64(captured: Capture) -> tuple[fx.GraphModule, tuple[Any, ...], dict[str, Any]]:
    """A float64 copy of a captured graph module, and of its example (args, kwargs).

    Raises FxMergeError for a model on the meta device.
    """
    if captured.blank:
        raise FxMergeError("a model on the meta device has no values to verify; give a model with weights")

    module = widened(deep_copy(captured.module, ()))
    for node in module.graph.nodes:  # casts to float32 in the graph would lose the precision of float64

        def cast(leaf: Any) -> Any:
            return _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

        node.args, node.kwargs = tree(cast, tuple(node.args)), tree(cast, dict(node.kwargs))
    module.recompile()
    return module, doubled(captured.args), doubled(dict(captured.kwargs))


def doubled(values: Any) -> Any:
    """Nested values with floating-point tensors in float64, and complex ones in complex128."""
    return tree(lambda v: wide(v) if isinstance(v, Tensor) else v, values)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float64 or complex128; one of integers as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def widened(module: M) -> M:
    """The module with its tensors in float64 and complex128, in place. `nn.Module.double` leaves complex ones."""
    module._apply(wide)  # type: ignore[no-untyped-call]
    return module


def whole(captured: Capture, module: fx.GraphModule) -> nn.Module:
    """The float64 model that users would get for a copy of the captured graph module."""
    return widened(assembled(captured, module))


def outputs_of(captured: Capture, module: fx.GraphModule, args: Any, kwargs: Any) -> list[Tensor]:
    """The outputs of `whole`. Raises FxMergeError for a model that does not run in float64."""
    try:
        with quiet(), double_precision():
            return outputs(whole(captured, module), args, kwargs)
    except Exception as error:
        raise FxMergeError(
            f"the model does not run in float64, in which it would be verified ({first_line(error)}); verify it "
            "without the op that takes narrower types only"
        ) from error


class _Widened(TorchFunctionMode):
    """Replaces casts to narrower floating-point and complex types by casts to float64 and complex128."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = _CASTS.get(func, func)
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return _WIDEST.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def double_precision() -> Iterator[None]:
    """Runs user code in float64: new tensors are float64 by default, and casts to narrower types give float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(before)
