"""Per-channel steps: what each node between a producer and a consumer computes from a group's channels.

A linear step multiplies each channel by a gain (or filters it) and adds a constant. Any other step is a nonlinear
function of each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Member
from fxmerge.ir.layer_ops import LayerOp
from fxmerge.ir.provenance import Layer


@dataclass(frozen=True)
class Step:
    """One step of a group's n channels: y = gain x + constant for each channel, or a nonlinear function.

    constant_gain:  (n,) the gain of a constant, which differs from `gain` for a filter
    features:       (n, m) unit vectors that merged channels must have in common (a filter's shape, a slope), or None
    function:       (samples, n) -> (samples, n), or None for a linear step
    """

    node: str
    gain: Tensor
    constant_gain: Tensor
    constant: Tensor
    features: Tensor | None = None
    function: Callable[[Tensor], Tensor] | None = None


def in_order(member: Member, n: int) -> bool:
    """Whether the layer has every channel of the group once, in the group's order."""
    return member.where.shape == (n, 1) and torch.equal(member.where[:, 0], torch.arange(n))


def laid_out(own: Tensor, member: Member, n: int, default: float) -> Tensor:
    """Expands values of the m channels in a layer, (m, ...), to all channels of the group, (n, ...)."""
    if len(own) == n:
        return own
    return own.new_full((n, *own.shape[1:]), default).index_copy_(0, member.channels, own)


def bias_of(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """The layer's bias in float64, or zeros if it has none."""
    out = layer.writes if layer.writes is not None else layer.carries
    assert out is not None
    return tensors[layer.params["bias"]].double() if "bias" in layer.params else torch.zeros(out.numel()).double()


def slot(member: Member, slot: str, tensors: Mapping[str, Tensor], n: int, default: float) -> Tensor:
    """One tensor of a per-channel parameter (its weight, say) for each channel, (n,): the mean over copies."""
    path = member.layer.params.get(slot)
    if path is None:
        return torch.full((n,), default, dtype=torch.float64)
    return laid_out(tensors[path].double().flatten()[member.where].mean(1), member, n, default)


def gamma_of(member: Member, tensors: Mapping[str, Tensor], n: int) -> Tensor:
    """The scale of a norm for each channel, (n,)."""
    return slot(member, "weight", tensors, n, 1.0)


def step_of(
    node: fx.Node, per_channel_param: Member | None, captured: Capture, tensors: Mapping[str, Tensor], n: int
) -> Step:
    """The step of one node."""
    one, zero = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    if per_channel_param is None:
        return Step(node.name, one, one, zero, function=_function(node, captured, n))
    op = per_channel_param.layer.operation
    if op.is_norm and op.name != "batch_norm":
        gain, constant = gamma_of(per_channel_param, tensors, n), slot(per_channel_param, "bias", tensors, n, 0.0)
        return Step(node.name, gain, gain, constant, function=lambda x: _normalised(x, op) * gain + constant)
    if op.is_norm:
        bn_std = (slot(per_channel_param, "running_var", tensors, n, 1.0) + per_channel_param.layer.eps).sqrt()
        gain = gamma_of(per_channel_param, tensors, n) / bn_std
        constant = slot(per_channel_param, "bias", tensors, n, 0.0) - gain * slot(
            per_channel_param, "running_mean", tensors, n, 0.0
        )
        return Step(node.name, gain, gain, constant)
    weight = tensors[per_channel_param.layer.params["weight"]].double()
    if op.is_depthwise:
        own = weight.flatten(1)[per_channel_param.where].flatten(1)  # (m, copies * kernel)
        filters = laid_out(own, per_channel_param, n, 1.0)
        gain, features = _split(filters)
        constant = laid_out(
            bias_of(per_channel_param.layer, tensors)[per_channel_param.where].mean(1), per_channel_param, n, 0.0
        )
        return Step(node.name, gain, filters.sum(1) / per_channel_param.where.size(1), constant, features)
    neutral = 0.0 if op.is_offset else 1.0
    values = laid_out(weight.flatten()[per_channel_param.where], per_channel_param, n, neutral)  # (n, copies)
    mean = values.mean(1)
    if op.is_scale:
        length, features = _split(1 / values if op.inverted else values)
        gain = length / values.size(1) ** 0.5
        flip = torch.where(mean < 0, -1.0, 1.0)
        return Step(node.name, gain * flip, gain * flip, zero, features * flip[:, None])
    if op.is_offset:
        sign = -1.0 if op.inverted == "activation" else 1.0
        return Step(node.name, one * sign, one * sign, -mean if op.inverted == "parameter" else mean)
    if op.name != "prelu":  # some other function: channels must have the parameter in common
        features = _split(torch.cat([torch.ones_like(values), values], 1))[1]
        return Step(node.name, one, one, zero, features, function=_with_parameter(node, mean))
    slopes = torch.cat([torch.ones_like(values), values], 1)  # channels must have the slope in common
    return Step(node.name, one, one, zero, _split(slopes)[1], function=lambda x: torch.where(x > 0, x, x * mean))


def _with_parameter(node: fx.Node, values: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of a channel and its parameter, x ** p, as a function of (samples, n)."""

    def apply(x: Tensor) -> Tensor:
        one, other = (values if isinstance(a, fx.Node) and a.op == "get_attr" else x for a in node.args[:2])
        method = isinstance(node.target, str)
        found: Tensor = getattr(one, str(node.target))(other) if method else node.target(one, other)  # type: ignore[operator]
        return found.to(x)

    try:
        fits = apply(torch.ones(2, len(values), dtype=torch.float64)).shape == (2, len(values))
    except (IndexError, RuntimeError, TypeError, ValueError):
        fits = False
    return apply if fits else lambda x: x  # a layer of several operands, whose function is not known here


def _normalised(x: Tensor, op: LayerOp) -> Tensor:
    """The output of a norm over channels, (samples, n); an InstanceNorm gives each channel mean 0 and deviation 1."""
    if op.name == "instance_norm":
        return (x - x.mean(0)) / x.std(0).clamp(min=1e-12)
    centred = x if op.name == "rms_norm" else x - x.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


def _split(filters: Tensor) -> tuple[Tensor, Tensor]:
    """The length and direction of each row: (n, m) -> (n,), (n, m)."""
    length = torch.linalg.vector_norm(filters, dim=1)
    return length, filters / length.clamp(min=1e-300)[:, None]


def _function(node: fx.Node, captured: Capture, n: int) -> Callable[[Tensor], Tensor] | None:
    """The node as a function of (samples, n), or None if it is linear for each channel (pooling, dropout)."""
    source = node.args[0] if node.args else None
    module = captured.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if node.target is F.glu or isinstance(module, nn.GLU):
        return lambda x: x * torch.sigmoid(x)  # a channel is in both halves
    if node.target is F.linear or isinstance(module, nn.Linear):
        return lambda x: x  # a map over positions, which does not preserve constants
    if not isinstance(source, fx.Node) or captured.shapes.get(source.name) != captured.shapes.get(node.name):
        return None
    pooling = nn.modules.pooling
    if isinstance(module, (nn.modules.dropout._DropoutNd, pooling._MaxPoolNd, pooling._AvgPoolNd)):
        return None
    if any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
        return None

    @torch.no_grad()
    def apply(x: Tensor) -> Tensor:
        if module is not None:
            return module(x.clone()).to(x)  # type: ignore[no-any-return]
        if node.op == "call_method":
            return getattr(x.clone(), str(node.target))(*node.args[1:], **node.kwargs)  # type: ignore[no-any-return]
        return node.target(x.clone(), *node.args[1:], **node.kwargs)  # type: ignore[operator,no-any-return]

    try:
        fits = apply(torch.zeros(2, n, dtype=torch.float64)).shape == (2, n)
    except (IndexError, RuntimeError, TypeError, ValueError):
        fits = False
    return apply if fits else lambda x: x  # the function needs the activation's own axes, and is not known here
