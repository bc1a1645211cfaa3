"""Rules of normalisations that couple channels: LayerNorm, RMSNorm, GroupNorm.

Their weights follow the labels exactly; but a channel that goes changes the mean and deviation that the others are
divided by, so dropping it is not exact. `ctx.mix` records that on the group.
"""

from __future__ import annotations

from typing import Any

from fxmerge.ir.labels import along, fixed, varying, without
from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules.layers import carry, carry_norm


def layer_norm(
    ctx: Any, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float | None = 1e-5
) -> Any:
    """y = gamma (x - mean) / sqrt(var + eps) + beta over the last len(normalized_shape) axes."""
    if not isinstance(input, Lab):
        return ctx.unknown("normalises something that is no activation")
    count = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    axes = range(input.t.dim() - count, input.t.dim())
    if not set(axes) & set(varying(input.t)):
        for param in (weight, bias):
            ctx.freeze(param, "normalises positions, not channels")
        return input
    ctx.mix(input.t)
    if count == 1:
        return carry(ctx, "layer_norm", input, {"weight": weight, "bias": bias}, axis=input.t.dim() - 1)
    for param in (weight, bias):  # parameters over several axes: a label for each element
        if isinstance(param, Param):
            ctx.tie(input.t, ctx.elements(param))
            ctx.layer("scale" if param is weight else "offset", {"weight": param.path}, carries=ctx.elements(param))
    return input


def rms_norm(ctx: Any, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """y = gamma x / sqrt(mean(x^2) + eps) over the last len(normalized_shape) axes."""
    return layer_norm(ctx, input, normalized_shape, weight, None)


def group_norm(ctx: Any, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """LayerNorm within each of `num_groups` blocks of channels (axis 1), which must therefore lose equally many."""
    if not isinstance(input, Lab) or input.t.dim() < 2:
        return ctx.unknown("does not normalise an activation with channels on axis 1")
    labels = ctx.along(input, 1)
    ctx.mix(labels)
    if num_groups > 1:
        ctx.block(labels.view(num_groups, -1))
    return carry(ctx, "group_norm", input, {"weight": weight, "bias": bias}, axis=1, groups=num_groups)


def instance_norm(
    ctx: Any,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Each channel of each sample normalised by itself: exact for every channel, whatever the others do."""
    params = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    return carry_norm(ctx, "instance_norm", input, params, eps)


def norm(ctx: Any, x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """The length of a vector: over channels a mixer, whose result holds none."""
    if not isinstance(x, Lab) or ctx.shape is None:
        return ctx.unknown("measures something that is no activation")
    axes = along(dim, x.t)
    if axes & set(varying(x.t)):
        ctx.mix(x.t)
        return Lab(fixed(ctx.shape))
    return Lab(without(x.t, axes, keepdim))


def normalize(ctx: Any, input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    """x / |x| along an axis: a mixer along that of the channels."""
    if not isinstance(input, Lab):
        return ctx.unknown("normalises something that is no activation")
    if dim % input.t.dim() in varying(input.t):
        ctx.mix(input.t)
    return input
