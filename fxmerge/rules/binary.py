"""Rules of ops with two operands: add, mul, where, ... whose labels are tied, position by position.

A raw parameter that meets an activation carries the labels of the activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxmerge.ir.labels import fixed, holds, numbers, rows, simplify, varying
from fxmerge.ir.layer_ops import LayerOp
from fxmerge.ir.provenance import Lab, Param, View
from fxmerge.rules.context import RuleContext, resized
from fxmerge.rules.rule import Operand, Unknown

Shape = tuple[int, ...]


def elementwise(ctx: RuleContext, a: Operand, b: Operand, **kwargs: Operand) -> Lab | Unknown:
    """Two operands meet position by position: channels of both that meet are tied."""
    if kwargs.get("out") is not None or ctx.shape is None:
        return Unknown("gives something other than one tensor")
    return combined(ctx, a, b, ctx.rule_name, ctx.shape)


def combined(ctx: RuleContext, a: Operand, b: Operand, rule_name: str, shape: Shape) -> Lab | Unknown:
    """Two operands of the op of a binary rule ("add", "mul", ...), which gives a tensor of that shape."""
    if not isinstance(a, Lab) and not isinstance(b, Lab):
        known, other = (a, b) if isinstance(a, Param) else (b, a)
        if isinstance(known, Param) and isinstance(other, Tensor) and not _own_sizes(known.value, other):
            return _meet(ctx, as_table(ctx, known).t, as_table(ctx, other).t, shape)
        return Unknown("joins parameters, not activations")
    if isinstance(a, Lab) and isinstance(b, Lab):
        if isinstance(a, View) == isinstance(b, View):
            return _meet(ctx, a.t, b.t, shape)
        if isinstance(a, View):
            return _raw_parameter(ctx, b, a, LayerOp.of_binary(rule_name, parameter_first=True), shape)
        assert isinstance(b, View)
        return _raw_parameter(ctx, a, b, LayerOp.of_binary(rule_name, parameter_first=False), shape)
    x, other = (a, b) if isinstance(a, Lab) else (b, a)
    assert isinstance(x, Lab)
    if isinstance(other, Param) and other.value.numel() > 1:
        return _raw_parameter(ctx, x, other, LayerOp.of_binary(rule_name, parameter_first=other is a), shape)
    value = other.value if isinstance(other, Param) else other
    if isinstance(value, Tensor) and meets(x.t, value.shape):
        return _constant(ctx, x, value, shape)
    return resized(x, shape)


def as_table(ctx: RuleContext, operand: Lab | Param | Tensor) -> Lab:
    """An operand of values that depend on no input (the angles of a rotation): its places go with those that they meet.

    A parameter or buffer that a table is computed from has a label for each element; a constant has none.
    """
    if isinstance(operand, View):
        ctx.layer("table", {"weight": operand.param}, carries=ctx.elements(operand.param))
        return Lab(operand.t)
    if isinstance(operand, Param):
        elements = ctx.elements(operand)
        ctx.layer("table", {"weight": operand}, carries=elements)
        return Lab(simplify(elements))
    return operand if isinstance(operand, Lab) else Lab(fixed(operand.shape))


def _own_sizes(value: Tensor, constant: Tensor) -> bool:
    """Has the constant entries of its own along an axis of the parameter?"""
    sizes = zip(reversed(value.shape), reversed(constant.shape), strict=False)
    return any(one > 1 and other > 1 for one, other in sizes)


def _constant(ctx: RuleContext, x: Lab, value: Tensor, shape: Shape) -> Lab | Unknown:
    """A constant that is the same for all blocks of x lets whole blocks leave."""
    why = "meets a constant tensor"
    ctx.want(value, x.t)
    sizes = [1] * (len(shape) - value.dim()) + list(value.shape)
    alone = [axis for axis in varying(x.t) if x.t.dim() == len(sizes) and sizes[axis] == 1]
    if not ctx.whole or not alone:
        return Unknown(why)
    ctx.bond(rows(x.t, alone), pins=(x.t, f"{ctx.called} {why}"))
    return resized(x, shape)


def addcmul(
    ctx: RuleContext, input: Operand, tensor1: Operand, tensor2: Operand, *, value: Operand = 1
) -> Lab | Unknown:
    """input + value * tensor1 * tensor2."""
    sizes = operand_shape(tensor1), operand_shape(tensor2)
    if ctx.shape is None or sizes[0] is None or sizes[1] is None:
        return Unknown("gives something other than one tensor")
    between = tuple(torch.broadcast_shapes(*sizes))  # type: ignore[no-untyped-call]
    product = combined(ctx, tensor1, tensor2, "mul", between)
    return product if isinstance(product, Unknown) else combined(ctx, input, product, "add", ctx.shape)


def glu(ctx: RuleContext, input: Operand, dim: int = -1) -> Lab | Unknown:
    """One half along an axis times the sigmoid of the other: the halves lose the same places."""
    if not isinstance(input, Lab):
        return Unknown("halves something that is not an activation")
    first, second = input.t.chunk(2, dim)
    if dim % input.t.dim() in varying(input.t):
        ctx.tie(first, second)
    return Lab(simplify(first))


def masked_fill(ctx: RuleContext, input: Operand, mask: Operand, value: Operand) -> Lab | Unknown:
    """where(mask, value, input) for a value that is one number."""
    return elementwise(ctx, input, mask)


def choose(ctx: RuleContext, condition: Operand, input: Operand, other: Operand) -> Lab | Unknown:
    """where(condition, input, other): operands that have entries of their own along the channels are tied."""
    if ctx.shape is None:
        return Unknown("gives something other than one tensor")
    found: Lab | None = None
    for operand in (input, other, condition):
        if isinstance(operand, Param):
            return Unknown("chooses between parameters")
        if isinstance(operand, Lab):
            if found is not None:
                answer = _meet(ctx, found.t, operand.t, ctx.shape)
            else:
                answer = resized(operand, ctx.shape) if operand.t.dim() == len(ctx.shape) else operand
            if isinstance(answer, Unknown):
                return answer
            found = answer
    if found is None:
        return Unknown("has no operand that is an activation")
    for operand in (input, other, condition):
        if isinstance(operand, Tensor) and meets(found.t, operand.shape):
            return Unknown("meets a constant tensor")
    return resized(found, ctx.shape)


def operand_shape(operand: Operand) -> Shape | None:
    """The shape of an operand; None for one that is not a tensor."""
    value = operand.t if isinstance(operand, Lab) else operand.value if isinstance(operand, Param) else operand
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _spreads(labels: Tensor, shape: Sequence[int]) -> bool:
    """Has an operand of that shape several entries along an axis where the tensor of the labels has one?"""
    sizes = [1] * (len(shape) - labels.dim()) + list(labels.shape)
    return any(own > 1 and size == 1 for own, size in zip(reversed(shape), reversed(sizes), strict=False))


def meets(labels: Tensor, shape: Sequence[int]) -> bool:
    """Has an operand of that shape entries of its own along an axis that the labels vary along?"""
    offset = len(shape) - labels.dim()
    return any(axis + offset >= 0 and shape[axis + offset] > 1 for axis in varying(labels))


def _raw_parameter(ctx: RuleContext, x: Lab, given: View | Param, op: LayerOp, shape: Shape) -> Lab | Unknown:
    """x + p, x * p and the like: p carries the labels of x along each axis where it has entries of its own."""
    param, size = (given.param, given.t.shape) if isinstance(given, View) else (given, given.value.shape)
    if not meets(x.t, size):
        if varying(x.t) or not _spreads(x.t, size):
            ctx.freeze(param, "is not per channel")
            return resized(x, shape)
        # one number meets all of a parameter, as in gamma * rsqrt(variance): the channels are those of the parameter
        ctx.pin(numbers(x.t), "is spread over the channels of another tensor")
        return Lab(simplify(torch.broadcast_to(as_table(ctx, given).t, shape)))
    elements = ctx.elements(param)
    ctx.layer(op, {"weight": param}, carries=elements)
    return _meet(ctx, x.t, given.t if isinstance(given, View) else elements, shape)


def _meet(ctx: RuleContext, a: Tensor, b: Tensor, shape: Shape) -> Lab | Unknown:
    """The labels of a tensor of that shape in which two label tensors meet; they are tied to each other."""
    dims = len(shape)
    a, b = (t.reshape([1] * (dims - t.dim()) + list(t.shape)) if t.dim() < dims else t for t in (a, b))
    a, b = simplify(a), simplify(b)
    a_alone = [axis for axis in varying(a) if b.size(axis) == 1]
    b_alone = [axis for axis in varying(b) if a.size(axis) == 1]
    if a_alone and b_alone:
        return Unknown("spreads two kinds of channels over each other")
    if b_alone:
        a, b, a_alone = b, a, b_alone
    shared = [axis for axis in varying(a) if b.size(axis) > 1]
    if a_alone and not shared:  # nothing to tie, but one channel of b feeds many of a's
        ctx.pin(numbers(b), "is spread over the channels of another tensor")
        return resized(Lab(a), shape)
    if not varying(a) and not varying(b) and not numbers(a).numel() and not numbers(b).numel():
        return Lab(a.expand(shape))
    for one, other in ((a, b), (b, a)):
        if ctx.counted(one, other):
            return Lab(simplify(torch.broadcast_to(one, shape)))
    ctx.meet(a, b)
    if len(varying(a)) == len(varying(b)):  # the labels that keep copies of a channel apart
        simplest = a if a_alone or not holds(b) or numbers(a).numel() >= numbers(b).numel() else b
    else:
        simplest = a if a_alone or len(varying(a)) < len(varying(b)) or not holds(b) else b
    return Lab(simplify(torch.broadcast_to(simplest, shape)))
