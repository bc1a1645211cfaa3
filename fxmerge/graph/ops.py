"""Calls as a torch function mode sees them, and the graph nodes that say the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.capture.torch_export import overload_name
from fxmerge.rules.movement import leaves

HARMLESS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "is_contiguous",
    "element_size", "get_device", "shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "requires_grad",
    "is_nested", "is_quantized", "is_mps", "is_meta", "is_cpu", "is_mkldnn", "itemsize", "storage_offset", "names",
    "__len__", "__hash__", "is_leaf", "grad_fn", "_is_view", "is_inference", "is_conj", "is_neg", "data_ptr", "grad",
}  # fmt: skip
PLAIN = (
    int,
    float,
    bool,
    complex,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type(...),
)
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem, "__setitem__": operator.setitem, "__and__": operator.and_, "__or__": operator.or_,
    "__invert__": operator.invert, "__eq__": operator.eq, "__ne__": operator.ne, "__lt__": operator.lt,
    "__le__": operator.le, "__gt__": operator.gt, "__ge__": operator.ge, "__pow__": operator.pow,
}  # fmt: skip
_UPDATES = ("iadd", "isub", "imul", "itruediv", "setitem")


def node_call(func: Any, name: str, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    """(op, target, args, kwargs) of the graph node for a function that the mode saw."""
    if getattr(func, "__name__", "") == "__get__":
        return "call_function", getattr, (args[0], name), {}
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args, kwargs
    if getattr(torch.Tensor, name, None) is func and not name.startswith("__"):
        return "call_method", name, args, kwargs
    if isinstance(func, torch._ops.OpOverloadPacket) and hasattr(func, "default"):
        func = func.default
    return "call_function", func, args, kwargs


def in_place(node: fx.Node, target: Any) -> bool:
    """Does the call update its first argument, so that later readers of that argument see the result?"""
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False))
    if overload_name(target) is not None:
        return bool(target._schema.name.endswith("_"))
    if node.kwargs.get("inplace"):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _UPDATES


def tensors(value: Any) -> list[Tensor]:
    return [v for v in leaves(value) if isinstance(v, Tensor)]


def held_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors that a model's modules hold in whatever attribute."""
    return [
        t for m in model.modules() for t in tensors([*vars(m).values(), *m._buffers.values(), *m._parameters.values()])
    ]
