"""Rules of the ops in which two operands meet: add, mul, where, ... whose labels become equal, position by position.

A raw parameter that meets an activation carries the labels that the activation brings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmerge.ir.labels import fixed, holds, numbers, rows, simplify, varying
from fxmerge.ir.provenance import Lab, Param, View


def elementwise(ctx: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """Two operands meet position by position: whatever channels both have there become one."""
    if kwargs.get("out") is not None or ctx.shape is None:
        return ctx.unknown("gives something other than one tensor")
    if not isinstance(a, Lab) and not isinstance(b, Lab):
        known, other = (a, b) if isinstance(a, Param) else (b, a)
        if isinstance(known, Param) and isinstance(other, Tensor) and not _own_sizes(known.value, other):
            return _meet(ctx, as_table(ctx, known).t, as_table(ctx, other).t)
    if (isinstance(a, Param) and isinstance(b, Param)) or not (isinstance(a, Lab) or isinstance(b, Lab)):
        return ctx.unknown("joins parameters, not activations")
    if isinstance(a, Lab) and isinstance(b, Lab):
        if isinstance(a, View) == isinstance(b, View):
            return _meet(ctx, a.t, b.t)
        return _raw_parameter(ctx, b, a, first=True) if isinstance(a, View) else _raw_parameter(ctx, a, b, first=False)
    x, other = (a, b) if isinstance(a, Lab) else (b, a)
    if isinstance(other, Param) and other.value.numel() > 1:
        return _raw_parameter(ctx, x, other, first=other is a)
    value = other.value if isinstance(other, Param) else other
    if isinstance(value, Tensor) and meets(x.t, value.shape):
        return _constant(ctx, x, value)
    return ctx.resized(x, ctx.shape)


def as_table(ctx: Any, operand: Any) -> Lab:
    """An operand of what depends on no input (the angles of a rotation, say): its places go with what they meet.

    A parameter or buffer that a table is computed from carries a label for each element; a constant holds none.
    """
    if isinstance(operand, View):
        ctx.layer("table", {"weight": operand.param.path}, carries=ctx.elements(operand.param))
        return Lab(operand.t)
    if isinstance(operand, Param):
        elements = ctx.elements(operand)
        ctx.layer("table", {"weight": operand.path}, carries=elements)
        return Lab(simplify(elements))
    return operand if isinstance(operand, Lab) else Lab(fixed(operand.shape))


def _own_sizes(value: Tensor, constant: Tensor) -> bool:
    """Has the constant entries of its own along an axis of the parameter?"""
    sizes = zip(reversed(value.shape), reversed(constant.shape), strict=False)
    return any(one > 1 and other > 1 for one, other in sizes)


def _constant(ctx: Any, x: Lab, value: Tensor) -> Any:
    """A constant that is the same for all blocks of x lets whole blocks leave."""
    sizes = [1] * (len(ctx.shape) - value.dim()) + list(value.shape)
    alone = [axis for axis in varying(x.t) if x.t.dim() == len(sizes) and sizes[axis] == 1]
    if not ctx.whole or not alone:
        return ctx.unknown("meets a constant tensor")
    ctx.bond(rows(x.t, alone), pins=(x.t, ctx.said("meets a constant tensor")))
    return ctx.resized(x, ctx.shape)


def addcmul(ctx: Any, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """input + value * tensor1 * tensor2."""
    shape, name = ctx.shape, ctx.rule_name
    sizes = operand_shape(tensor1), operand_shape(tensor2)
    ctx.shape, ctx.rule_name = tuple(torch.broadcast_shapes(*sizes)), "mul"  # type: ignore[no-untyped-call]
    product = elementwise(ctx, tensor1, tensor2)
    ctx.shape, ctx.rule_name = shape, "add"
    total = elementwise(ctx, input, product) if isinstance(product, Lab) else product
    ctx.rule_name = name
    return total


def glu(ctx: Any, input: Any, dim: int = -1) -> Any:
    """One half along an axis times the sigmoid of the other: the halves lose the same places."""
    if not isinstance(input, Lab):
        return ctx.unknown("halves something that is no activation")
    first, second = input.t.chunk(2, dim)
    if dim % input.t.dim() in varying(input.t):
        ctx.tie(first, second)
    return Lab(simplify(first))


def masked_fill(ctx: Any, input: Any, mask: Any, value: Any) -> Any:
    """where(mask, value, input) for a value that is one number."""
    return elementwise(ctx, input, mask)


def choose(ctx: Any, condition: Any, input: Any, other: Any) -> Any:
    """where(condition, input, other): all that have a place of their own along the channels become one."""
    found: Any = None
    for operand in (input, other, condition):
        if isinstance(operand, Param):
            return ctx.unknown("chooses between parameters")
        if isinstance(operand, Lab):
            if found is None:
                found = ctx.resized(operand, ctx.shape) if operand.t.dim() == len(ctx.shape) else operand
            else:
                found = _meet(ctx, found.t, operand.t)
        if not isinstance(found, Lab) and found is not None:
            return found
    for operand in (input, other, condition):
        if isinstance(operand, Tensor) and found is not None and meets(found.t, operand.shape):
            return ctx.unknown("meets a constant tensor")
    return ctx.unknown("has no operand that is an activation") if found is None else ctx.resized(found, ctx.shape)


def operand_shape(operand: Any) -> tuple[int, ...]:
    value = operand.t if isinstance(operand, Lab) else operand.value if isinstance(operand, Param) else operand
    return tuple(value.shape)


def meets(labels: Tensor, shape: Any) -> bool:
    """Does an operand of that shape have a size of its own along an axis that the labels vary along?"""
    offset = len(shape) - labels.dim()
    return any(axis + offset >= 0 and shape[axis + offset] > 1 for axis in varying(labels))


def _raw_parameter(ctx: Any, x: Lab, given: Lab | Param, first: bool) -> Any:
    """x + p, x * p and their like: p carries what x brings wherever it has a size of its own."""
    assert isinstance(given, (View, Param))
    param, shape = (given.param, given.t.shape) if isinstance(given, View) else (given, given.value.shape)
    if not meets(x.t, shape):
        ctx.freeze(param, "is not per channel")
        return ctx.resized(x, ctx.shape)
    elements = ctx.elements(param)
    op = {"add": "offset", "sub": "offset", "mul": "scale", "div": "scale"}.get(ctx.rule_name, ctx.rule_name)
    sign = ("-" if ctx.rule_name == "sub" else "/" if ctx.rule_name == "div" else "") + ("r" if first else "")
    ctx.layer(op + (sign if sign not in ("", "r") else ""), {"weight": param.path}, carries=elements)
    return _meet(ctx, x.t, given.t if isinstance(given, View) else elements)


def _meet(ctx: Any, a: Tensor, b: Tensor) -> Any:
    dims = len(ctx.shape)
    a, b = (t.reshape([1] * (dims - t.dim()) + list(t.shape)) if t.dim() < dims else t for t in (a, b))
    a, b = simplify(a), simplify(b)
    a_alone = [axis for axis in varying(a) if b.size(axis) == 1]
    b_alone = [axis for axis in varying(b) if a.size(axis) == 1]
    if a_alone and b_alone:
        return ctx.unknown("spreads two kinds of channels over each other")
    if b_alone:
        a, b, a_alone = b, a, b_alone
    shared = [axis for axis in varying(a) if b.size(axis) > 1]
    if a_alone and not shared:  # b has no place along a's channels: nothing to tie, but one channel of b feeds many
        ctx.pin(numbers(b), "is spread over the channels of another tensor")
        return ctx.resized(Lab(a), ctx.shape)
    if not varying(a) and not varying(b) and not numbers(a).numel() and not numbers(b).numel():
        return Lab(a.expand(ctx.shape))
    for one, other in ((a, b), (b, a)):
        if ctx.counted(one, other):
            return Lab(simplify(torch.broadcast_to(one, ctx.shape)))
    ctx.meet(a, b)
    if len(varying(a)) == len(varying(b)):  # the one that tells copies of a channel from each other
        simplest = a if a_alone or not holds(b) or numbers(a).numel() >= numbers(b).numel() else b
    else:
        simplest = a if a_alone or len(varying(a)) < len(varying(b)) or not holds(b) else b
    return Lab(simplify(torch.broadcast_to(simplest, ctx.shape)))
