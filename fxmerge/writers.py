"""Rules of the ops that own per-channel parameters or meet two operands: writers, carriers and ties.

A writer (linear, convolution) reads labels on its reduction axis, column j of the weight reading label l, and makes
new ones on its output axis. A carrier (BatchNorm, depthwise convolution, a raw parameter) ties its own per-channel
parameters to the labels that pass. A tie makes the labels of two operands equal, position by position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ir import Lab, Param, View
from .labels import holds, numbers, simplify, spread, varying


def _operands(ctx: Any, x: Any, weight: Any, bias: Any) -> str | None:
    """Why these are not the operands of a writer, or None."""
    if not isinstance(x, Lab):
        return "has an input that does not depend on the model's input"
    if not isinstance(weight, Param):
        return "has a weight that is computed, not a parameter"
    if bias is not None and not isinstance(bias, Param):
        return "has a bias that is computed, not a parameter"
    return None


def _slots(**slots: Any) -> dict[str, str]:
    return {slot: param.path for slot, param in slots.items() if isinstance(param, Param)}


def linear(ctx: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    """y = x W' + b over the last axis. W: (out, in)."""
    why = _operands(ctx, input, weight, bias)
    if why:
        return ctx.unknown(why)
    axes = varying(input.t)
    last = input.t.dim() - 1
    if axes and last not in axes and input.t.size(last) > 1:
        # A map over positions (an MLP-mixer's tokens), the same for every channel: it has no channels of its own.
        ctx.freeze(weight, "maps positions, not channels")
        ctx.freeze(bias, "maps positions, not channels")
        ctx.kind = "per_channel"
        return ctx.resized(input, ctx.shape)
    reads, writes = ctx.along(input, last), ctx.axis(weight, 0)
    ctx.tie(reads, ctx.axis(weight, 1))
    if bias is not None:
        ctx.tie(writes, ctx.axis(bias, 0))
    ctx.layer("linear", _slots(weight=weight, bias=bias), reads=reads[None], writes=writes)
    return Lab(spread(writes, ctx.shape, len(ctx.shape) - 1))


def adds_no_bias(ctx: Any, input: Any, weight: Any, bias: Any = None) -> bool:
    """A map over positions commutes with scaling unless it adds something."""
    return bias is None


def matrix(ctx: Any, input: Lab, weight: Param, bias: Any = None) -> Any:
    """y = x W + b over the last axis, with the weight the other way round. W: (in, out)."""
    last = input.t.dim() - 1
    if varying(input.t) and last not in varying(input.t) and input.t.size(last) > 1:
        return ctx.unknown("maps positions, not channels")
    return _transposed(ctx, "matrix", input, weight, bias, last)


def _transposed(ctx: Any, op: str, input: Lab, weight: Param, bias: Any, axis: int) -> Any:
    """A writer whose weight reads on its first axis and writes on its second."""
    reads, writes = ctx.along(input, axis), ctx.axis(weight, 1)
    ctx.tie(reads, ctx.axis(weight, 0))
    if bias is not None:
        ctx.tie(writes, ctx.axis(bias, 0))
    ctx.layer(op, _slots(weight=weight, bias=bias), reads=reads[None], writes=writes, transposed=True)
    return Lab(spread(writes, ctx.shape, axis))


def embedding(
    ctx: Any,
    input: Any = None,
    weight: Any = None,
    padding_idx: Any = None,
    max_norm: Any = None,
    *rest: Any,
    **kwargs: Any,
) -> Any:
    """Rows of a table: W (entries, channels) writes channels and reads nothing; its entries stay."""
    if max_norm is not None:
        return ctx.unknown("changes its table as it reads it (max_norm)")
    if not isinstance(weight, Param) or ctx.shape is None:
        return ctx.unknown("has a table that is computed, not a parameter")
    writes = ctx.axis(weight, 1)
    ctx.layer("embedding", _slots(weight=weight), writes=writes, transposed=True)
    return Lab(spread(writes, ctx.shape, len(ctx.shape) - 1))


def conv_transpose(
    ctx: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """Transposed convolution. W: (in, out/groups, *kernel)."""
    why = _operands(ctx, input, weight, bias)
    if why or groups > 1:
        return ctx.unknown(why or "is grouped")
    return _transposed(ctx, "conv_transpose", input, weight, bias, input.t.dim() - (weight.value.dim() - 2) - 1)


def conv(
    ctx: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Convolution in 1, 2 or 3 dimensions. W: (out, in/groups, *kernel)."""
    why = _operands(ctx, input, weight, bias)
    if why:
        return ctx.unknown(why)
    axis = input.t.dim() - (weight.value.dim() - 2) - 1  # the batch axis may be missing
    reads, slots = ctx.along(input, axis), _slots(weight=weight, bias=bias)
    out, per_group = weight.value.shape[:2]
    if groups > 1 and per_group == 1:
        passed = reads.repeat_interleave(out // groups)
        for param in (weight, bias):
            if param is not None:
                ctx.tie(passed, ctx.axis(param, 0))
        ctx.layer("depthwise", slots, carries=passed, groups=groups)
        return Lab(spread(passed, ctx.shape, axis))
    writes = ctx.axis(weight, 0)
    if bias is not None:
        ctx.tie(writes, ctx.axis(bias, 0))
    if groups > 1:
        ctx.block(reads.view(groups, -1))
        ctx.block(writes.view(groups, -1))
    ctx.tie(reads, ctx.axis(weight, 1, groups))
    ctx.layer("conv", slots, reads=reads.view(groups, -1), writes=writes, groups=groups)
    return Lab(spread(writes, ctx.shape, axis))


def carry(ctx: Any, op: str, x: Lab, params: dict[str, Any], axis: int, eps: float = 0.0) -> Any:
    """Tie per-channel parameters (C,) to the labels along an axis of x."""
    if any(p is not None and not isinstance(p, Param) for p in params.values()):
        return ctx.unknown("has per-channel constants that are computed, not parameters")
    labels = ctx.along(x, axis)
    along = [ctx.axis(param, 0) for param in params.values() if param is not None]
    if along:
        ctx.tie(labels.expand(len(along), -1), torch.stack(along))
    ctx.layer(op, _slots(**params), carries=labels, eps=eps)
    return x


def batch_norm(
    ctx: Any,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """y = gamma (x - mean) / sqrt(var + eps) + beta over axis 1."""
    params = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    return carry_norm(ctx, "batch_norm", input, params, eps)


def carry_norm(ctx: Any, op: str, input: Any, params: dict[str, Any], eps: float) -> Any:
    """A norm with parameters for each channel, on axis 1."""
    if not isinstance(input, Lab) or input.t.dim() < 2:
        return ctx.unknown("does not normalise an activation with channels on axis 1")
    return carry(ctx, op, input, params, axis=1, eps=eps)


def elementwise(ctx: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """Two operands meet position by position: whatever channels both have there become one."""
    if kwargs.get("out") is not None or ctx.shape is None:
        return ctx.unknown("gives something other than one tensor")
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
        return ctx.unknown("meets a constant tensor")
    return ctx.resized(x, ctx.shape)


def addcmul(ctx: Any, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """input + value * tensor1 * tensor2."""
    shape, name = ctx.shape, ctx.rule_name
    sizes = [t.t.shape if isinstance(t, Lab) else t.value.shape if isinstance(t, Param) else t.shape
             for t in (tensor1, tensor2)]  # fmt: skip
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
    ctx.tie(a, b)
    if len(varying(a)) == len(varying(b)):  # the one that tells copies of a channel from each other
        simplest = a if a_alone or not holds(b) or numbers(a).numel() >= numbers(b).numel() else b
    else:
        simplest = a if a_alone or len(varying(a)) < len(varying(b)) or not holds(b) else b
    return Lab(simplify(torch.broadcast_to(simplest, ctx.shape)))
