"""Calls of ops: as graph nodes, as a torch function mode sees them, and as aten overloads.

node_call, HARMLESS, PLAIN, tensors, held_tensors: for a graph that is recorded while the model runs.
called: what a node calls.
in_place, updates: whether a call updates its first argument.
Aten, overload_name, by_name: for aten ops, whose names and arguments follow a schema.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.graph.nested import leaves

# attributes and methods of a tensor that tell nothing about its values; calls of these need no node
HARMLESS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex", "is_contiguous",
    "element_size", "get_device", "shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "requires_grad",
    "is_nested", "is_quantized", "is_mps", "is_meta", "is_cpu", "is_mkldnn", "itemsize", "storage_offset", "names",
    "__len__", "__hash__", "is_leaf", "grad_fn", "_is_view", "is_inference", "is_conj", "is_neg", "data_ptr", "grad",
}  # fmt: skip
# types that a graph can hold as literal arguments
PLAIN = (
    int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...),
)  # fmt: skip
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem, "__setitem__": operator.setitem, "__and__": operator.and_, "__or__": operator.or_,
    "__invert__": operator.invert, "__eq__": operator.eq, "__ne__": operator.ne, "__lt__": operator.lt,
    "__le__": operator.le, "__gt__": operator.gt, "__ge__": operator.ge, "__pow__": operator.pow,
}  # fmt: skip


def node_call(func: Any, name: str, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    """The (op, target, args, kwargs) of the graph node for a call that a torch function mode intercepted.

    name: the name of `func`; for the getter of an attribute, the name of the attribute
    """
    if getattr(func, "__name__", "") == "__get__":
        return "call_function", getattr, (args[0], name), {}
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args, kwargs
    if getattr(torch.Tensor, name, None) is func and not name.startswith("__"):
        return "call_method", name, args, kwargs
    if isinstance(func, torch._ops.OpOverloadPacket) and hasattr(func, "default"):
        func = func.default
    return "call_function", func, args, kwargs


def tensors(value: Any) -> list[Tensor]:
    """The tensors among the leaves of a nested value, in order."""
    return [v for v in leaves(value) if isinstance(v, Tensor)]


def held_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors in the parameters, buffers and plain attributes of a model's modules."""
    return [
        t
        for m in nn.Module.modules(model)
        for t in tensors([*vars(m).values(), *m._buffers.values(), *m._parameters.values()])
    ]


_UPDATES = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem",
    "__setitem__",
)  # fmt: skip


def in_place(node: fx.Node, target: Any) -> bool:
    """Returns whether a call updates its first argument, so that later readers of that argument see the result.

    target: the module that a call_module node calls; for any other node, its target
    """
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False))
    if overload_name(target) is not None:
        return bool(target._schema.name.endswith("_"))
    if node.kwargs.get("inplace"):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _UPDATES


def called(module: fx.GraphModule, node: fx.Node) -> Any:
    """The module that a call_module node calls; for any other node, its target."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else node.target


def updates(module: fx.GraphModule, node: fx.Node) -> bool:
    """Returns whether a node of a graph module is a call that updates its first argument (`in_place`)."""
    return node.op.startswith("call_") and in_place(node, called(module, node))


@dataclass(frozen=True)
class Aten:
    """An aten op for which torch has no function or method of the same name."""

    name: str  # as `overload_name` gives it


def overload_name(target: Any) -> str | None:
    """The plain name of an op overload: `relu` for aten.relu_.default, `ns::op` in other namespaces. Otherwise None."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.removeprefix("aten::")
    return name.removesuffix("_") if name.endswith("_") and not name.endswith("__") else name


def plain_name(node: fx.Node | None) -> str:
    """The plain name of the function or method that a node calls; "" for any other node."""
    if node is None or node.op not in ("call_function", "call_method"):
        return ""
    named = overload_name(node.target) or node.target
    return named if isinstance(named, str) else getattr(named, "__name__", "")


def by_name(target: Any, args: list[Any], kwargs: dict[str, Any], accepted: dict[str, Any]) -> tuple[list[Any], Any]:
    """The arguments of an aten call as (args, kwargs) for its rule, whose parameters may come in another order.

    Arguments are passed by their names in the op's schema where the rule accepts those names; the schema's `self` is
    the rule's `input`. Where the rule accepts none of the names (as for `a + b`), arguments are passed by position.

    target: an aten op overload
    accepted: the parameters of the rule's function (inspect.Parameter) by name, the first of which is its context
    """
    known = [a.name for a in target._schema.arguments]
    given = dict(zip(known, args, strict=False)) | kwargs
    if "self" in given and "input" in accepted and "input" not in known:
        known[known.index("self")], given["input"] = "input", given.pop("self")
    first, *rest = [name for name in known if name in given]
    if not any(name in accepted for name in (first, *rest)):
        slots = [p for p in accepted.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)][1:]
        return list(args) if slots and slots[-1].kind is slots[-1].VAR_POSITIONAL else list(args)[: len(slots)], {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    named = {name: given[name] for name in rest if name in accepted or takes_any}
    positions = [p.name for p in accepted.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]  # without the context
    if first in positions:
        return [], {first: given[first], **named}
    return [given[first]], named
