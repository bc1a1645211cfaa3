"""Runs models in float64, so that an error of the analysis cannot be taken for rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxmerge.errors import FxMergeError
from fxmerge.graph.nested import tree
from fxmerge.ir.capture import Capture
from fxmerge.rewrite.reassemble import assembled

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


def in_float64(captured: Capture) -> tuple[fx.GraphModule, tuple[Any, ...], dict[str, Any]]:
    """A float64 copy of a captured graph module, and of its example (args, kwargs).

    Raises FxMergeError for a model on the meta device.
    """
    if captured.blank:
        raise FxMergeError("a model on the meta device has no values to verify; give a model with weights")

    module = copy.deepcopy(captured.module).double()
    for node in module.graph.nodes:  # casts to float32 in the graph would lose the precision of float64

        def cast(leaf: Any) -> Any:
            return torch.float64 if leaf is torch.float32 else leaf

        node.args, node.kwargs = tree(cast, tuple(node.args)), tree(cast, dict(node.kwargs))
    module.recompile()
    return module, doubled(captured.args), doubled(dict(captured.kwargs))


def doubled(values: Any) -> Any:
    """Nested values with floating-point tensors in float64."""
    return tree(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def whole(captured: Capture, module: fx.GraphModule) -> nn.Module:
    """The float64 model that users would get for a copy of the captured graph module."""
    return assembled(captured, module).double()


class _Widened(TorchFunctionMode):
    """Replaces casts to narrower floating-point types by casts to float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func in _CASTS else func
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


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
