"""Rules of the ops that own per-channel weights: producers, and layers with per-channel parameters.

A producer (linear, convolution) reads labels on its reduction axis (column j of the weight reads label l) and makes
new labels on its output axis. The parameters of BatchNorm, of a depthwise convolution and of other per-channel layers
are tied to the labels of the activation that passes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxmerge.ir.labels import holds, spread, varying
from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules.context import RuleContext, resized
from fxmerge.rules.rule import Answer, AsKind, Operand, Unknown

Shape = tuple[int, ...]


def _operands(
    ctx: RuleContext, x: Operand, weight: Operand, bias: Operand
) -> tuple[Lab, Param, Param | None, Shape] | Unknown:
    """A producer's input, weight, bias and output shape; Unknown where one of them is not what a producer takes."""
    if isinstance(weight, Param) and (not isinstance(x, Lab) or not holds(x.t)):
        ctx.want(x, torch.arange(2).view(-1, *[1] * (weight.value.dim() - 2)))  # a constant that a loop begins with
    if not isinstance(x, Lab):
        return Unknown("has an input that does not depend on the model's input")
    if not isinstance(weight, Param):
        return Unknown("has a weight that is computed, not a parameter")
    if bias is not None and not isinstance(bias, Param):
        return Unknown("has a bias that is computed, not a parameter")
    if ctx.shape is None:
        return Unknown("gives something other than one tensor")
    return x, weight, bias, ctx.shape


def linear(ctx: RuleContext, input: Operand, weight: Operand, bias: Operand = None) -> Answer:
    """y = x W' + b over the last axis. W: (out, in)."""
    found = _operands(ctx, input, weight, bias)
    if isinstance(found, Unknown):
        return found
    x, w, b, shape = found
    last = x.t.dim() - 1
    if maps_positions(x):
        return _over_positions(ctx, x, (w, b), shape)
    reads, writes = ctx.along(x, last), ctx.axis(w, 0)
    ctx.tie(reads, ctx.axis(w, 1))
    if b is not None:
        ctx.tie(writes, ctx.axis(b, 0))
    ctx.layer("linear", {"weight": w, "bias": b}, reads=reads[None], writes=writes)
    return Lab(spread(writes, shape, len(shape) - 1))


def _over_positions(ctx: RuleContext, x: Lab, params: tuple[Param | None, ...], shape: Shape) -> AsKind:
    """A map over positions, as over the tokens of an MLP-Mixer: the same for every channel."""
    for param in params:
        ctx.freeze(param, "maps positions, not channels")
    return AsKind("per_channel", resized(x, shape))


def maps_positions(x: Lab) -> bool:
    """Do labels vary along other axes than the last, which a product with a weight sums over?"""
    last = x.t.dim() - 1
    return bool(varying(x.t)) and last not in varying(x.t) and x.t.size(last) > 1


def adds_no_bias(ctx: RuleContext, input: Operand, weight: Operand, bias: Operand = None) -> bool:
    """A map over positions commutes with scaling unless it adds something."""
    return bias is None


def matrix(ctx: RuleContext, input: Operand, weight: Operand, bias: Operand = None, transposed: bool = True) -> Answer:
    """y = x W + b over the last axis. W: (in, out), or (out, in) if not `transposed`."""
    found = _operands(ctx, input, weight, bias)
    if isinstance(found, Unknown):
        return found
    if maps_positions(found[0]):
        return Unknown("maps positions, not channels")
    return _product(ctx, "matrix", found, found[0].t.dim() - 1, transposed)


def _product(
    ctx: RuleContext, op: str, operands: tuple[Lab, Param, Param | None, Shape], axis: int, transposed: bool = True
) -> Lab:
    """A producer whose weight reads on its first axis and writes on its second, or the other way round."""
    x, weight, bias, shape = operands
    reads, writes = ctx.along(x, axis), ctx.axis(weight, int(transposed))
    ctx.tie(reads, ctx.axis(weight, 1 - int(transposed)))
    if bias is not None:
        ctx.tie(writes, ctx.axis(bias, 0))
    ctx.layer(op, {"weight": weight, "bias": bias}, reads=reads[None], writes=writes, transposed=transposed)
    return Lab(spread(writes, shape, axis))


def experts(
    ctx: RuleContext, input: Operand, weight: Param, shape: Shape | None, transposed: bool = True,
    key: fx.Node | None = None,
) -> Answer:  # fmt: skip
    """A product with a matrix for each expert: W (experts, in, out), or (experts, out, in) if not `transposed`.

    Channels are on the last axis. key: the node that tells which expert each row is for; None if all compute each row
    """
    if not isinstance(input, Lab) or shape is None:
        return Unknown("has an input that does not depend on the model's input")
    if maps_positions(input):
        return Unknown("maps positions, not channels")
    into, out = (1, 2) if transposed else (2, 1)
    reads, writes = ctx.along(input, input.t.dim() - 1), ctx.axis(weight, out)
    ctx.tie(reads, ctx.axis(weight, into))
    for axis in (into, out):
        ctx.stack(weight, ctx.axis(weight, axis), key, axis=axis)
    ctx.layer("experts", {"weight": weight}, reads=reads[None], writes=writes, transposed=transposed)
    return Lab(spread(writes, shape, len(shape) - 1))


def embedding(
    ctx: RuleContext,
    input: Operand = None,
    weight: Operand = None,
    padding_idx: Operand = None,
    max_norm: Operand = None,
    *rest: Operand,
    **kwargs: Operand,
) -> Lab | Unknown:
    """Rows of a table: W (entries, channels) writes channels and reads nothing; its entries stay."""
    if max_norm is not None:
        return Unknown("changes its table as it reads it (max_norm)")
    if not isinstance(weight, Param) or ctx.shape is None:
        return Unknown("has a table that is computed, not a parameter")
    writes = ctx.axis(weight, 1)
    ctx.layer("embedding", {"weight": weight}, writes=writes, transposed=True)
    return Lab(spread(writes, ctx.shape, len(ctx.shape) - 1))


def embedding_bag(
    ctx: RuleContext,
    input: Operand = None,
    *given: Operand,
    weight: Operand = None,
    max_norm: Operand = None,
    **kwargs: Operand,
) -> Lab | Unknown:
    """Sums, means or maxima of some rows of a table, as `embedding`. The function takes the table as its second."""
    table = next((g for g in given if isinstance(g, Param)), weight)
    changes = max_norm is not None or any(isinstance(g, float) for g in given)
    return embedding(ctx, input, table, None, 1.0 if changes else None)


def conv_transpose(
    ctx: RuleContext,
    input: Operand,
    weight: Operand,
    bias: Operand = None,
    stride: Operand = 1,
    padding: Operand = 0,
    output_padding: Operand = 0,
    groups: int = 1,
    dilation: Operand = 1,
) -> Answer:
    """Transposed convolution. W: (in, out/groups, *kernel)."""
    if isinstance(input, Lab) and isinstance(weight, (Lab, Tensor)):
        return filtered(ctx, input, weight, bias, groups)
    found = _operands(ctx, input, weight, bias)
    if isinstance(found, Unknown):
        return found
    x, w, b, shape = found
    axis = _channel_axis(x, w)
    if groups == 1:
        return _product(ctx, "conv_transpose", found, axis)
    reads = ctx.along(x, axis)
    if tuple(w.value.shape[:2]) == (groups, 1):
        return _depthwise(ctx, "depthwise_transpose", found, reads, groups)
    ctx.tie(reads, ctx.axis(w, 0))
    writes = ctx.axis(w, 1, groups)
    if b is not None:
        ctx.tie(writes, ctx.axis(b, 0))
    _by_group(ctx, reads.view(groups, -1), writes.view(groups, -1))
    layer = {"weight": w, "bias": b}
    ctx.layer("conv_transpose", layer, reads=reads.view(groups, -1), writes=writes, groups=groups, transposed=True)
    return Lab(spread(writes, shape, axis))


def _by_group(ctx: RuleContext, reads: Tensor, writes: Tensor) -> None:
    """All groups lose equally many inputs and outputs, (groups, size); or whole groups leave."""
    ctx.block(reads)
    ctx.block(writes)
    ctx.bond(torch.cat([reads, writes], 1))


def _channel_axis(x: Lab, weight: Param) -> int:
    """The channel axis of a convolution's input, which may have no batch axis."""
    return x.t.dim() - (weight.value.dim() - 2) - 1


def _depthwise(
    ctx: RuleContext, op: str, operands: tuple[Lab, Param, Param | None, Shape], passed: Tensor, groups: int
) -> Lab:
    """A filter for each channel: the first axis of W carries the labels that pass."""
    x, weight, bias, shape = operands
    for param in (weight, bias):
        if param is not None:
            ctx.tie(passed, ctx.axis(param, 0))
    ctx.layer(op, {"weight": weight, "bias": bias}, carries=passed, groups=groups)
    return Lab(spread(passed, shape, _channel_axis(x, weight)))


def conv(
    ctx: RuleContext,
    input: Operand,
    weight: Operand,
    bias: Operand = None,
    stride: Operand = 1,
    padding: Operand = 0,
    dilation: Operand = 1,
    groups: int = 1,
) -> Answer:
    """Convolution in 1, 2 or 3 dimensions. W: (out, in/groups, *kernel)."""
    if isinstance(input, Lab) and isinstance(weight, (Lab, Tensor)):
        return filtered(ctx, input, weight, bias, groups)
    found = _operands(ctx, input, weight, bias)
    if isinstance(found, Unknown):
        return found
    x, w, b, shape = found
    axis = _channel_axis(x, w)
    alone = w.value[0, 0].numel() == 1 and x.t.shape[axis + 1 :] == shape[axis + 1 :]  # a kernel of size 1, stride 1
    if groups == 1 and alone and varying(x.t) and min(varying(x.t)) > axis:
        return _over_positions(ctx, x, (w, b), shape)
    reads = ctx.along(x, axis)
    out, per_group = w.value.shape[:2]
    if groups > 1 and per_group == 1:
        return _depthwise(ctx, "depthwise", found, reads.repeat_interleave(out // groups), groups)
    writes = ctx.axis(w, 0)
    if b is not None:
        ctx.tie(writes, ctx.axis(b, 0))
    if groups > 1:
        _by_group(ctx, reads.view(groups, -1), writes.view(groups, -1))
    ctx.tie(reads, ctx.axis(w, 1, groups))
    ctx.layer("conv", {"weight": w, "bias": b}, reads=reads.view(groups, -1), writes=writes, groups=groups)
    return Lab(spread(writes, shape, axis))


def filtered(ctx: RuleContext, x: Lab, weight: Lab | Tensor, bias: Operand, groups: int) -> Answer:
    """A computed filter that is the same for every channel, as a blur: made as often as there are channels."""
    shape = weight.t.shape if isinstance(weight, Lab) else weight.shape
    axis = x.t.dim() - (len(shape) - 2) - 1
    if bias is not None or tuple(shape[:2]) != (groups, 1) or x.t.size(axis) != groups or ctx.shape is None:
        return Unknown("has a weight that is computed, not a parameter")
    passed = ctx.along(x, axis)
    if not isinstance(weight, Lab) or varying(weight.t) != (0,):
        ctx.want(weight, passed.view(-1, *[1] * (len(shape) - 1)))
        return Unknown("has a weight that is computed, not a parameter")
    ctx.tie(passed, ctx.along(weight, 0))
    return AsKind("per_channel", Lab(spread(passed, ctx.shape, axis)))


def same_filter(ctx: RuleContext, input: Operand, weight: Operand, *rest: Operand, **kwargs: Operand) -> bool:
    """A factor passes a convolution with a computed filter, which has no bias; other convolutions make channels."""
    return isinstance(weight, Lab)


def carry(
    ctx: RuleContext,
    op: str,
    x: Lab,
    params: Mapping[str, Operand],
    *,
    axis: int,
    eps: float = 0.0,
    groups: int = 1,
    batch_statistics: bool = False,
) -> Lab | Unknown:
    """Tie per-channel parameters (C,) to the labels along an axis of x."""
    if any(p is not None and not isinstance(p, Param) for p in params.values()):
        return Unknown("has per-channel constants that are computed, not parameters")
    labels = ctx.shared_along(x, axis)
    along = [ctx.axis(param, 0) for param in params.values() if isinstance(param, Param)]
    if along:
        ctx.tie(labels.expand(len(along), -1), torch.stack(along))
    ctx.layer(op, params, carries=labels, eps=eps, groups=groups, batch_statistics=batch_statistics)
    return x
