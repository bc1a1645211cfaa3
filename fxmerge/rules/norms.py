"""Rules of normalisations: BatchNorm, LayerNorm, RMSNorm, GroupNorm and InstanceNorm.

Their weights follow the labels exactly. But LayerNorm, RMSNorm and GroupNorm divide each channel by statistics of
several channels: without one of them the others change, so dropping it is not exact. `ctx.mix` records that.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fxmerge.ir.labels import along, fixed, varying, without
from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules.context import RuleContext
from fxmerge.rules.layers import carry
from fxmerge.rules.rule import Answer, AsKind, Operand, Unknown


def batch_norm(
    ctx: RuleContext,
    input: Operand,
    running_mean: Operand = None,
    running_var: Operand = None,
    weight: Operand = None,
    bias: Operand = None,
    training: Operand = False,
    momentum: Operand = 0.1,
    eps: float = 1e-5,
) -> Lab | Unknown:
    """y = gamma (x - mean) / sqrt(var + eps) + beta over axis 1."""
    params = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    return carry_norm(ctx, "batch_norm", input, params, eps, bool(training))


def carry_norm(
    ctx: RuleContext, op: str, input: Operand, params: Mapping[str, Operand], eps: float, own_statistics: bool
) -> Lab | Unknown:
    """A norm with parameters for each channel, on axis 1, or for each position, if the channels are on another axis.

    own_statistics: whether it uses its input's mean and variance although it may have stored others
    """
    if not isinstance(input, Lab) or input.t.dim() < 2:
        return Unknown("does not normalise an activation with channels on axis 1")
    own = own_statistics or not isinstance(params["running_mean"], Param)
    if not own and varying(input.t) and 1 not in varying(input.t):
        for param in params.values():
            ctx.freeze(param, "normalises positions, not channels")
        return input
    return carry(ctx, op, input, params, axis=1, eps=eps, batch_statistics=own)


def by_channel(ctx: RuleContext, input: Operand, *rest: Operand, **kwargs: Operand) -> bool:
    """A factor passes a norm of each channel, in its affine map; it does not pass an affine map of each position."""
    return isinstance(input, Lab) and 1 in varying(input.t)


def layer_norm(
    ctx: RuleContext,
    input: Operand,
    normalized_shape: int | tuple[int, ...],
    weight: Operand = None,
    bias: Operand = None,
    eps: float | None = 1e-5,
) -> Lab | Unknown:
    """y = gamma (x - mean) / sqrt(var + eps) + beta over the last len(normalized_shape) axes."""
    if not isinstance(input, Lab):
        return Unknown("normalises something that is not an activation")
    count = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    axes = range(input.t.dim() - count, input.t.dim())
    if not set(axes) & set(varying(input.t)):
        for param in (weight, bias):
            ctx.freeze(param, "normalises positions, not channels")
        return input
    ctx.mix(input.t, axes)
    if count == 1:
        return carry(ctx, ctx.rule_name, input, {"weight": weight, "bias": bias}, axis=input.t.dim() - 1)
    for op, param in (("scale", weight), ("offset", bias)):  # over several axes: a label for each element
        if isinstance(param, Param):
            ctx.tie(input.t, ctx.elements(param))
            ctx.layer(op, {"weight": param}, carries=ctx.elements(param))
    if weight is None and bias is None:
        ctx.layer(ctx.rule_name, {})  # its module keeps the sizes of these axes
    return input


def rms_norm(
    ctx: RuleContext,
    input: Operand,
    normalized_shape: int | tuple[int, ...],
    weight: Operand = None,
    eps: float | None = None,
) -> Lab | Unknown:
    """y = gamma x / sqrt(mean(x^2) + eps) over the last len(normalized_shape) axes."""
    return layer_norm(ctx, input, normalized_shape, weight, None)


def group_norm(
    ctx: RuleContext,
    input: Operand,
    num_groups: int,
    weight: Operand = None,
    bias: Operand = None,
    eps: float = 1e-5,
) -> Answer:
    """LayerNorm within each of `num_groups` blocks of channels (axis 1), which must therefore lose equally many.

    With as many blocks as channels it is InstanceNorm.
    """
    if not isinstance(input, Lab) or input.t.dim() < 2:
        return Unknown("does not normalise an activation with channels on axis 1")
    if num_groups == input.t.size(1):
        params = {"weight": weight, "bias": bias}
        alone = carry(ctx, "instance_norm", input, params, axis=1, eps=eps, groups=num_groups, batch_statistics=True)
        return alone if isinstance(alone, Unknown) else AsKind("per_channel", alone)
    labels = ctx.along(input, 1)
    ctx.mix(labels)
    if num_groups > 1:
        ctx.block(labels.view(num_groups, -1))
    return carry(ctx, "group_norm", input, {"weight": weight, "bias": bias}, axis=1, groups=num_groups)


def instance_norm(
    ctx: RuleContext,
    input: Operand,
    running_mean: Operand = None,
    running_var: Operand = None,
    weight: Operand = None,
    bias: Operand = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Lab | Unknown:
    """Each channel of each sample is normalised by its own statistics, whatever the other channels are."""
    params = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    # a module has running statistics only where it uses them
    own = bool(use_input_stats) and not isinstance(ctx.target, nn.Module)
    return carry_norm(ctx, "instance_norm", input, params, eps, own)


def norm(
    ctx: RuleContext, x: Operand, ord: Operand = 2, dim: int | tuple[int, ...] | None = None, keepdim: bool = False,
    **kwargs: Operand,
) -> Lab | Unknown:  # fmt: skip
    """The length of a vector. Over channels it is a mixer, whose result holds no channels."""
    if not isinstance(x, Lab) or ctx.shape is None:
        return Unknown("measures something that is not an activation")
    axes = along(dim, x.t)
    if axes & set(varying(x.t)):
        ctx.mix(x.t)
        ctx.hold_places(x.t, set(varying(x.t)) - axes, single=True)
        return Lab(fixed(ctx.shape))
    return Lab(without(x.t, axes, keepdim))


def normalize(
    ctx: RuleContext, input: Operand, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Operand = None
) -> Lab | Unknown:
    """x / |x| along an axis. Along the channels it is a mixer."""
    if not isinstance(input, Lab):
        return Unknown("normalises something that is not an activation")
    if dim % input.t.dim() in varying(input.t):
        ctx.mix(input.t, {dim % input.t.dim()})
    return input
