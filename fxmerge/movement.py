"""Ops that only move entries about: executed on the labels, so that no index map is ever written by hand.

After a merge their literal sizes may be wrong (`view(b, 4, 16)` of 32 surviving channels). `resized` proposes new
literals from the shape that the surviving labels have, and `rewrite` proves a proposal by running it on those labels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .ir import Lab, Param
from .labels import FIXED, fixed, simplify, varying

SPELLINGS: dict[str, tuple[Any, ...]] = {
    "view": ("view", "reshape", torch.reshape, "view_as", "reshape_as"),
    "flatten": (nn.Flatten, torch.flatten, "flatten"),
    "unflatten": (nn.Unflatten, torch.unflatten, "unflatten"),
    "squeeze": (torch.squeeze, "squeeze"),
    "unsqueeze": (torch.unsqueeze, "unsqueeze"),
    "permute": (torch.permute, "permute"),
    "transpose": (torch.transpose, "transpose", torch.swapaxes, torch.swapdims, "swapaxes", "swapdims", "t", torch.t),
    "movedim": (torch.movedim, torch.moveaxis, "movedim", "moveaxis"),
    "cat": (torch.cat, torch.concat, torch.concatenate),
    "stack": (torch.stack,),
    "chunk": (torch.chunk, "chunk"),
    "split": (torch.split, torch.functional.split, "split", torch.tensor_split, "tensor_split"),
    "unbind": (torch.unbind, "unbind"),
    "getitem": (operator.getitem,),
    "narrow": (torch.narrow, "narrow"),
    "select": (torch.select, "select"),
    "expand": ("expand", "expand_as", torch.broadcast_to, "broadcast_to"),
    "repeat": ("repeat", torch.repeat_interleave, "repeat_interleave", torch.tile, "tile"),
    "roll": (torch.roll, "roll"),
    "flip": (torch.flip, "flip"),
    "pixel_shuffle": (nn.PixelShuffle, torch.pixel_shuffle, nn.PixelUnshuffle, torch.pixel_unshuffle),
    "channel_shuffle": (nn.ChannelShuffle, torch.channel_shuffle),
}


@dataclass(frozen=True)
class Call:
    """One call: the target and its arguments, nodes or values alike."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_COPYING = {"view": "reshape", "view_as": "reshape_as"}  # label tensors are seldom contiguous


def varying_axes(x: Lab) -> tuple[int, ...]:
    return varying(x.t)


def run(target: Any, args: Any, kwargs: Any) -> Any:
    """One movement op on plain tensors: `target` is a method's name, a function or a module."""
    if isinstance(target, str):
        return getattr(args[0], _COPYING.get(target, target))(*args[1:], **kwargs)
    return target(*args, **kwargs)


def tree(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with the function applied to each leaf of its lists, tuples, dicts and slices."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(tree(function, v) for v in value))
    if isinstance(value, torch.Size):
        return tuple(tree(function, v) for v in value)
    if isinstance(value, (list, tuple)):
        return type(value)(tree(function, v) for v in value)
    if isinstance(value, dict):
        return {k: tree(function, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(tree(function, value.start), tree(function, value.stop), tree(function, value.step))
    return function(value)


def leaves(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples, dicts and slices, in order."""
    found: list[Any] = []
    tree(found.append, value)
    return found


def execute(ctx: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the op on labels. A constant tensor joined to labels holds no channel; as an index it stays itself."""
    indexing = ctx.rule_name == "getitem"

    def as_labels(value: Any) -> Any:
        if isinstance(value, Lab):
            return value.t
        if isinstance(value, Param):
            return ctx.elements(value)
        if isinstance(value, Tensor) and not indexing:
            return fixed(value.shape)
        return value

    if indexing and not isinstance(args[0], (Lab, Param)):
        if any(isinstance(leaf, Lab) for leaf in leaves(args[1])):
            return ctx.unknown("is indexed by something that depends on the input")
        return operator.getitem(args[0], args[1])
    if indexing and any(isinstance(leaf, Lab) for leaf in leaves(args[1:])):
        return ctx.unknown("is indexed by something that depends on the input")
    plain_args, plain_kwargs = tree(as_labels, list(args)), tree(as_labels, kwargs)
    if ctx.rule_name in ("cat", "stack"):
        _tie_across(ctx, plain_args, plain_kwargs)
    out = run(ctx.target, plain_args, plain_kwargs)

    def as_value(value: Any) -> Any:
        return Lab(simplify(value)) if isinstance(value, Tensor) else value

    result = tree(as_value, tuple(out) if isinstance(out, (list, tuple)) else out)
    before = max((len(varying(t)) for t in leaves(plain_args) if isinstance(t, Tensor)), default=0)
    for value in leaves(result):
        if isinstance(value, Lab) and len(varying(value.t)) > max(before, 1):
            # a channel axis became (blocks, size): what is kept must stay a rectangle
            _block(ctx, value.t)
    return result


def _block(ctx: Any, labels: Tensor) -> None:
    axes = varying(labels)
    rows = labels[tuple(slice(None) if a in axes else 0 for a in range(labels.dim()))]
    rows = rows.reshape(-1, rows.size(-1))
    if torch.unique(rows).numel() == rows.numel() and not bool((rows == FIXED).any()):
        ctx.block(rows)


def _tie_across(ctx: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Joined operands must lose the same places along every axis but the joined one."""
    tensors = [t for t in args[0] if isinstance(t, Tensor) and t.numel()]
    axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    if ctx.rule_name == "stack":
        tensors, axis = [t.unsqueeze(axis) for t in tensors], axis
    axis %= max(tensors[0].dim(), 1)
    first = tensors[0].select(axis, 0)
    if len(varying(first)) == 0 and all(len(varying(t.select(axis, 0))) == 0 for t in tensors):
        return
    for t in tensors:
        for other in t.unbind(axis) if axis in varying(t) else [t.select(axis, 0)]:
            ctx.tie(first, other)


Survivors = Callable[[int], Tensor]  # axis of the first operand -> bool (size,), which places along it survive


def resized(name: str, call: Call, before: Any, after: Any, survivors: Survivors) -> Call | None:
    """The call with new literal sizes, for an op whose output narrows from shapes `before` to `after`.

    Only literal integers change; values that the graph computes are left to it. None: no proposal is known. A proposal
    is a guess that the caller proves by running it on the labels that survive.
    """
    proposal = _PROPOSALS.get(name)
    return proposal(call, before, after, survivors) if proposal else None


def _sizes(call: Call, before: Any, after: Any, survivors: Survivors) -> Call | None:
    """view, reshape, expand: sizes that were literal become the new shape's."""
    args = list(call.args)
    packed = len(args) > 1 and isinstance(args[1], (list, tuple))
    sizes = list(args[1]) if packed else args[1:]
    if len(sizes) != len(after):
        return None
    new = [a if isinstance(s, int) and s != -1 and b != a else s for s, b, a in zip(sizes, before, after, strict=True)]
    return Call(call.target, (args[0], tuple(new)) if packed else (args[0], *new), call.kwargs)


def _unflatten(call: Call, before: Any, after: Any, survivors: Survivors) -> Call | None:
    if len(call.args) != 3 or not isinstance(call.args[2], (list, tuple)):
        return None
    x, dim, sizes = call.args
    start = dim % (len(after) - len(sizes) + 1)
    new = [a if isinstance(s, int) and s != -1 else s for s, a in zip(sizes, after[start:], strict=False)]
    return Call(call.target, (x, dim, tuple(new)), call.kwargs)


def _pieces(call: Call, before: Any, after: Any, survivors: Survivors) -> Call | None:
    """chunk and split: an explicit list of sizes along the axis that is cut."""
    axis = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else 0)
    sizes = [a[axis % len(a)] for a in after]
    return Call("split" if isinstance(call.target, str) else torch.split, (call.args[0], sizes, axis), {})


def _index(call: Call, before: Any, after: Any, survivors: Survivors) -> Call | None:
    """x[:, 8:24]: a bound becomes the number of survivors before it. Any other index along a narrowed axis: None."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    new: list[Any] = []
    axis = 0
    for item in index:
        if item is None:
            new.append(item)
            continue
        if item is Ellipsis:
            return None
        stays = survivors(axis)
        if not bool(stays.all()):
            if not isinstance(item, slice) or item.step not in (None, 1):
                return None
            start, stop, _ = item.indices(len(stays))
            item = slice(
                None if item.start is None else int(stays[:start].sum()),
                None if item.stop is None else int(stays[:stop].sum()),
            )
        new.append(item)
        axis += 1
    return Call(call.target, (call.args[0], tuple(new)), call.kwargs)


def _narrow(call: Call, before: Any, after: Any, survivors: Survivors) -> Call | None:
    if len(call.args) != 4:
        return None
    x, dim, start, length = call.args
    stays = survivors(dim)
    start %= len(stays)
    return Call(call.target, (x, dim, int(stays[:start].sum()), int(stays[start : start + length].sum())), call.kwargs)


_PROPOSALS: dict[str, Callable[[Call, Any, Any, Survivors], Call | None]] = {
    "view": _sizes,
    "expand": _sizes,
    "unflatten": _unflatten,
    "chunk": _pieces,
    "split": _pieces,
    "getitem": _index,
    "narrow": _narrow,
}
