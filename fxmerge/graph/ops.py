"""Calls as a torch function mode sees them, and the graph nodes that say the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.graph.nested import leaves

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
    """Does the call update its first argument, so that later consumers of that argument see the result?"""
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


@dataclass(frozen=True)
class Aten:
    """An aten op, by its plain name, that no function or method of torch has the name of."""

    name: str


def overload_name(target: Any) -> str | None:
    """The plain name of a registered op, `relu` for aten.relu_.default, `ns::op` elsewhere; None for anything else."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.removeprefix("aten::")
    return name.removesuffix("_") if name.endswith("_") and not name.endswith("__") else name


def by_name(target: Any, args: list[Any], kwargs: dict[str, Any], accepted: dict[str, Any]) -> tuple[list[Any], Any]:
    """The arguments of an aten call, by the names of its schema where the rule accepts them (its order may differ)."""
    known = [a.name for a in target._schema.arguments]
    given = dict(zip(known, args, strict=False)) | kwargs
    if "self" in given and "input" in accepted and "input" not in known:
        known[known.index("self")], given["input"] = "input", given.pop("self")
    first, *rest = [name for name in known if name in given]
    if not any(name in accepted for name in (first, *rest)):  # operands without names of their own: a + b
        slots = [p for p in accepted.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)][1:]
        return list(args) if slots and slots[-1].kind is slots[-1].VAR_POSITIONAL else list(args)[: len(slots)], {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    named = {name: given[name] for name in rest if name in accepted or takes_any}
    positions = [p.name for p in accepted.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]  # without ctx
    if first in positions:
        return [], {first: given[first], **named}
    return [given[first]], named
