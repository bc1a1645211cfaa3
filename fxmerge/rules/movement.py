"""Rules of ops that only move entries: they are executed on the labels, so that no index map has to be written.

After a merge their literal sizes may be wrong (`view(b, 4, 16)` with 32 channels left): see `resize.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmerge.graph.nested import leaves, tree
from fxmerge.graph.ops import Aten
from fxmerge.ir.labels import FIXED, fixed, holds, rows, simplify, spread, varying
from fxmerge.ir.provenance import Lab, Param, Turned, View
from fxmerge.rules.context import RuleContext, resized
from fxmerge.rules.rule import Answer, AsKind, Operand, Unknown
from fxmerge.rules.tables import row_of, turns

SPELLINGS: dict[str, tuple[Any, ...]] = {
    "view": ("view", "reshape", torch.reshape, "view_as", "reshape_as"),
    "flatten": (nn.Flatten, torch.flatten, "flatten"),
    "unflatten": (nn.Unflatten, torch.unflatten, "unflatten"),
    "squeeze": (torch.squeeze, "squeeze"),
    "unsqueeze": (torch.unsqueeze, "unsqueeze"),
    "permute": (torch.permute, "permute"),
    "transpose": (
        torch.transpose,
        "transpose",
        torch.swapaxes,
        torch.swapdims,
        "swapaxes",
        "swapdims",
        "t",
        torch.t,
        torch.adjoint,
        "adjoint",
        Aten("numpy_T"),
        Aten("matrix_H"),
        Aten("mT"),
    ),
    "movedim": (torch.movedim, torch.moveaxis, "movedim", "moveaxis"),
    "cat": (torch.cat, torch.concat, torch.concatenate),
    "hstack": (torch.hstack,),
    "column_stack": (torch.column_stack,),
    "vstack": (torch.vstack, torch.row_stack),
    "dstack": (torch.dstack,),
    "stack": (torch.stack,),
    "chunk": (torch.chunk, "chunk"),
    "split": (torch.split, torch.functional.split, "split", torch.tensor_split, "tensor_split", "split_with_sizes"),
    "unbind": (torch.unbind, "unbind"),
    "getitem": (operator.getitem,),
    "slice": (Aten("slice"),),
    "index": (Aten("index"),),
    "index_select": (torch.index_select, "index_select"),
    "narrow": (torch.narrow, "narrow"),
    "select": (torch.select, "select"),
    "expand": ("expand", torch.broadcast_to, "broadcast_to"),
    "repeat": ("repeat", torch.repeat_interleave, "repeat_interleave", torch.tile, "tile"),
    "roll": (torch.roll, "roll"),
    "flip": (torch.flip, "flip"),
    "pixel_unshuffle": (nn.PixelUnshuffle, torch.pixel_unshuffle),
    "unfold": (nn.Unfold, F.unfold, "unfold", Aten("im2col")),
}
INDEXING = ("getitem", "index", "index_select", "gather")  # tensor operands after the first are indices, not labels
CHOOSING = ("getitem", "select", "unbind", "chunk", "split")  # may take one place along an axis
# label tensors are seldom contiguous, as a view requires
_COPYING: dict[Any, Any] = {
    "view": "reshape",
    "view_as": "reshape_as",
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
}


def run(target: Any, args: Any, kwargs: Any) -> Any:
    """One movement op on plain tensors: `target` is a method's name, a function or a module."""
    if isinstance(target, str):
        return getattr(args[0], str(_COPYING.get(target, target)))(*args[1:], **kwargs)
    if isinstance(target, nn.Unfold) or target in (F.unfold, torch.ops.aten.im2col.default):
        # not implemented for integers; labels are exact in float64
        return target(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    return (target if isinstance(target, nn.Module) else _COPYING.get(target, target))(*args, **kwargs)


def execute(ctx: RuleContext, *args: Operand, **kwargs: Operand) -> Answer:
    """Run the op on labels. A constant tensor is labels without channels, but as an index it keeps its values."""
    indexing = ctx.rule_name in INDEXING

    def as_labels(value: Any) -> Any:
        if isinstance(value, Lab):
            return value.t
        if isinstance(value, Param):
            return value.value.cpu() if indexing and value is not args[0] else ctx.elements(value)
        if isinstance(value, Tensor) and not indexing:
            return fixed(value.shape)
        return value.cpu() if isinstance(value, Tensor) else value

    if indexing and not isinstance(args[0], (Lab, Param)):
        if any(isinstance(leaf, Lab) for leaf in leaves(args[1])):
            return Unknown("is indexed by values that depend on the input")
        return run(ctx.target, args, kwargs)
    if isinstance(args[0], Param) and turns(ctx, args, kwargs):
        return Turned(args[0])
    if indexing and any(isinstance(leaf, Lab) for leaf in leaves([*args[1:], kwargs])):
        row = row_of(ctx, args) if isinstance(args[0], Param) else None
        if row is not None:
            return row
        return _indexed_by_values(ctx, tree(as_labels, list(args)), tree(as_labels, kwargs), args)
    plain_args, plain_kwargs = tree(as_labels, list(args)), tree(as_labels, kwargs)
    if ctx.rule_name in _JOINING and isinstance(args[0], (list, tuple)):
        _want_constants(ctx, args[0], plain_args, plain_kwargs)
        _tie_across(ctx, plain_args, plain_kwargs)
        for raw in (v.param if isinstance(v, View) else v for v in args[0] if isinstance(v, (View, Param))):
            ctx.layer("joined", {"weight": raw}, carries=ctx.elements(raw))
    out = run(ctx.target, plain_args, plain_kwargs)

    moved = args[0].param if isinstance(args[0], View) else args[0]
    if isinstance(moved, Param) and isinstance(out, Tensor):
        return View(simplify(out), moved)

    def as_value(value: Any) -> Any:
        return Lab(simplify(value)) if isinstance(value, Tensor) else value

    result = tree(as_value, tuple(out) if isinstance(out, (list, tuple)) else out)
    before = max((len(varying(t)) for t in leaves(plain_args) if isinstance(t, Tensor)), default=0)
    if ctx.rule_name in CHOOSING and isinstance(args[0], Lab) and len(varying(args[0].t)) > 1:
        _hold_chosen(ctx, args[0].t, plain_args, plain_kwargs)
    for value in leaves(result):
        if isinstance(value, Lab) and len(varying(value.t)) > max(before, 1) and ctx.rule_name != "stack":
            _block(ctx, value.t)  # a channel axis became (blocks, size): what is kept must stay a rectangle
    return result


def _indexed_by_values(
    ctx: RuleContext, labels: list[Any], kwargs: dict[str, Any], args: tuple[Operand, ...]
) -> Lab | Unknown:
    """x[:, i] for indices i that depend on the input: known if labels do not vary along the axes that i indexes.

    This is found by trying the first and the last index. A mask gives another shape and is refused.
    """
    if any(isinstance(leaf, Lab) and holds(leaf.t) for leaf in leaves(list(args[1:]))):
        return Unknown("is indexed by channels")
    first = run(ctx.target, labels, kwargs)
    shifted = [tree(lambda v: v - 1 if isinstance(v, Tensor) and not holds(v) else v, a) for a in labels[1:]]
    last = run(ctx.target, [labels[0], *shifted], kwargs) if ctx.rule_name != "gather" else first
    if ctx.rule_name == "gather" and labels[1] % labels[0].dim() in varying(labels[0]):
        return Unknown("is indexed by values that depend on the input")
    if tuple(first.shape) != tuple(ctx.shape or ()) or not bool((first == last).all()):
        return Unknown("is indexed by values that depend on the input")
    return Lab(simplify(first))


def pad(ctx: RuleContext, input: Operand, pad: Sequence[int], mode: str = "constant", value: Operand = None) -> Answer:
    """Padding. Along an axis of channels the zeros get labels of their own, dropped with the labels that they meet."""
    if not isinstance(input, Lab) or ctx.shape is None:
        return Unknown("pads something that is not an activation")
    dims, labels, moved = input.t.dim(), input.t, False
    for at in range(0, len(pad), 2):
        axis = dims - 1 - at // 2
        if (pad[at] or pad[at + 1]) and axis in varying(labels):
            if mode != "constant" or pad[at] < 0 or pad[at + 1] < 0:
                return Unknown("pads the channels with something other than zeros")
            shape = list(labels.shape)
            sides = []
            for count in (pad[at], pad[at + 1]):
                shape[axis] = count
                sides.append(spread(ctx.fresh(count), shape, axis))
            labels, moved = torch.cat([sides[0], labels, sides[1]], axis), True
    padded = resized(Lab(simplify(labels)), ctx.shape)
    return AsKind("movement", padded) if moved else padded


def pads_with_zero(
    ctx: RuleContext, input: Operand, pad: Sequence[int], mode: str = "constant", value: Operand = None
) -> bool:
    """Padding is linear unless it adds something."""
    return mode != "constant" or value is None or (isinstance(value, (int, float)) and value == 0)


def enter(value: Any) -> Any:
    """The identity. A recorded graph calls it on each value that enters a part, and so names the value inside it."""
    return value


def entered(ctx: RuleContext, value: Operand) -> Answer:
    """The rule of `enter`."""
    return value


def expand_as(ctx: RuleContext, input: Operand, other: Operand) -> Answer:
    """A tensor without channels that is expanded over the channels of another has an entry for each of them."""
    if isinstance(input, Lab) and isinstance(other, Lab) and not holds(input.t):
        return AsKind("per_channel", Lab(other.t))
    return execute(ctx, input, other)


def _block(ctx: RuleContext, labels: Tensor) -> None:
    """Record the rows of labels that vary along several axes, if each row is made of channels of its own."""
    axes = varying(labels)
    rows = labels[tuple(slice(None) if a in axes else 0 for a in range(labels.dim()))]
    outer = tuple(rows.shape[:-1])
    rows = rows.reshape(-1, rows.size(-1))
    if bool((rows[1:] == rows[0]).all(1).any()):  # the same block several times, once for each sample
        rows = torch.unique(rows, dim=0)
        outer = (len(rows),)
    if torch.unique(rows).numel() == rows.numel() and not bool((rows == FIXED).any()):
        ctx.block(rows, outer)


def _hold_chosen(ctx: RuleContext, x: Tensor, args: list[Any], kwargs: dict[str, Any]) -> None:
    """x[..., 0] takes one place along an axis of channels: they may not move along it."""
    for axis in varying(x):
        place = spread(torch.arange(x.size(axis)), x.shape, axis)
        taken = [t for t in leaves(run(ctx.target, [place, *args[1:]], kwargs)) if isinstance(t, Tensor)]
        if taken and all(t.numel() and not varying(simplify(t)) for t in taken):
            ctx.hold_places(x, {axis}, single=True)


def _beside(ctx: RuleContext, tensors: list[Tensor], axis: int) -> bool:
    """Are parts of blocks joined, as the rotated halves of each attention head? Then each part stays a rectangle.

    The joined axis lies inside the blocks, so the rows of each operand lose equally many. Where blocks leave whole,
    the blocks at one place of all operands leave together.
    """
    blocks = [a for a in varying(tensors[0]) if a != axis]
    if not blocks or max(blocks) > axis or any(varying(t) != (*blocks, axis) for t in tensors):
        return False
    inside = [rows(t, blocks) for t in tensors]
    if any(bool((r == FIXED).any()) or torch.unique(r).numel() < r.numel() for r in inside):
        return False
    for part in inside:
        ctx.block(part, tuple(tensors[0].size(a) for a in blocks))
    ctx.bond(torch.cat(inside, 1))
    return True


_JOINING = ("cat", "stack", "hstack", "column_stack", "vstack", "dstack")


def _want_constants(ctx: RuleContext, given: Sequence[Operand], args: list[Any], kwargs: dict[str, Any]) -> None:
    """Constants among joined operands follow the channels of the others, or have channels along the joined axis."""
    tensors = [t for t in args[0] if isinstance(t, Tensor)]
    axis = _joined_axis(ctx.rule_name, tensors[0].dim(), args, kwargs) % max(tensors[0].dim(), 1)
    across = next((t for t in tensors if any(a != axis for a in varying(t))), None)
    for operand, own in zip(given, args[0], strict=True):
        if ctx.rule_name != "stack" and isinstance(own, Tensor) and own.numel() and not holds(own):
            if across is not None and across.dim() == own.dim():
                ctx.want(operand, across.narrow(axis, 0, 1))
            elif across is None and axis < own.dim():
                ctx.want(operand, spread(torch.arange(own.size(axis)), own.shape, axis))


def _joined_axis(rule_name: str, dims: int, args: list[Any], kwargs: dict[str, Any]) -> int:
    """The axis along which tensors with so many axes are joined."""
    if rule_name in ("hstack", "column_stack", "vstack", "dstack"):
        return {"hstack": min(1, dims - 1), "column_stack": 1, "vstack": 0, "dstack": 2}[rule_name]
    axis: int = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    return axis


def _tie_across(ctx: RuleContext, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Joined operands must lose the same places along every axis but the joined one."""
    tensors = [t for t in args[0] if isinstance(t, Tensor) and t.numel()]
    axis = _joined_axis(ctx.rule_name, tensors[0].dim() if tensors else 1, args, kwargs)
    if ctx.rule_name == "vstack" and tensors[0].dim() == 1:
        tensors = [t.unsqueeze(0) for t in tensors]
    if ctx.rule_name == "column_stack" and tensors[0].dim() == 1:
        tensors = [t.unsqueeze(1) for t in tensors]
    if ctx.rule_name == "dstack":
        tensors = list(torch.atleast_3d(tensors))  # type: ignore[no-untyped-call]
    if ctx.rule_name == "stack":
        tensors, axis = [t.unsqueeze(axis) for t in tensors], axis
    axis %= max(tensors[0].dim(), 1)
    if _beside(ctx, tensors, axis):
        return
    first = tensors[0].select(axis, 0)
    if len(varying(first)) == 0 and all(len(varying(t.select(axis, 0))) == 0 for t in tensors):
        return
    for t in tensors:
        for other in t.unbind(axis) if axis in varying(t) else [t.select(axis, 0)]:
            ctx.tie(first, other)
