"""Rules of the ops that own per-channel parameters: producers and per-channel parameters.

A producer (linear, convolution) reads labels on its reduction axis, column j of the weight reading label l, and makes
new ones on its output axis. An op with per-channel parameters (BatchNorm, depthwise convolution, a raw parameter) ties
them to the labels that pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmerge.ir.labels import spread, varying
from fxmerge.ir.provenance import Lab, Param


def _operands(ctx: Any, x: Any, weight: Any, bias: Any) -> str | None:
    """Why these are not the operands of a producer, or None."""
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
    """A producer whose weight reads on its first axis and writes on its second."""
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


def embedding_bag(
    ctx: Any, input: Any = None, *given: Any, weight: Any = None, max_norm: Any = None, **kwargs: Any
) -> Any:
    """Sums, means or maxima of some rows of a table: as `embedding`. The function takes the table second."""
    table = next((g for g in given if isinstance(g, Param)), weight)
    changes = max_norm is not None or any(isinstance(g, float) for g in given)
    return embedding(ctx, input, table, None, 1.0 if changes else None)


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
    """Transposed convolution. W: (in, out/groups, *kernel); of the grouped ones, those with one channel a group."""
    why = _operands(ctx, input, weight, bias)
    if not why and groups > 1 and tuple(weight.value.shape[:2]) != (groups, 1):
        why = "is grouped"
    if why:
        return ctx.unknown(why)
    axis = input.t.dim() - (weight.value.dim() - 2) - 1
    if groups == 1:
        return _transposed(ctx, "conv_transpose", input, weight, bias, axis)
    return _depthwise(ctx, "depthwise_transpose", ctx.along(input, axis), weight, bias, axis, groups)


def _depthwise(ctx: Any, op: str, passed: Tensor, weight: Param, bias: Any, axis: int, groups: int) -> Any:
    """A filter for each channel: W's first axis carries what is passed on."""
    for param in (weight, bias):
        if param is not None:
            ctx.tie(passed, ctx.axis(param, 0))
    ctx.layer(op, _slots(weight=weight, bias=bias), carries=passed, groups=groups)
    return Lab(spread(passed, ctx.shape, axis))


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
        return _depthwise(ctx, "depthwise", reads.repeat_interleave(out // groups), weight, bias, axis, groups)
    writes = ctx.axis(weight, 0)
    if bias is not None:
        ctx.tie(writes, ctx.axis(bias, 0))
    if groups > 1:
        ctx.block(reads.view(groups, -1))
        ctx.block(writes.view(groups, -1))
        ctx.bond(torch.cat([reads.view(groups, -1), writes.view(groups, -1)], 1))
    ctx.tie(reads, ctx.axis(weight, 1, groups))
    ctx.layer("conv", slots, reads=reads.view(groups, -1), writes=writes, groups=groups)
    return Lab(spread(writes, ctx.shape, axis))


def carry(ctx: Any, op: str, x: Lab, params: dict[str, Any], axis: int, eps: float = 0.0, groups: int = 1) -> Any:
    """Tie per-channel parameters (C,) to the labels along an axis of x."""
    if any(p is not None and not isinstance(p, Param) for p in params.values()):
        return ctx.unknown("has per-channel constants that are computed, not parameters")
    labels = ctx.carried(x, axis)
    along = [ctx.axis(param, 0) for param in params.values() if param is not None]
    if along:
        ctx.tie(labels.expand(len(along), -1), torch.stack(along))
    ctx.layer(op, _slots(**params), carries=labels, eps=eps, groups=groups)
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
