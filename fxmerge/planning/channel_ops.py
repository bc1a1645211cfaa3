"""Per-channel steps: what each node between a producer and a consumer computes from a group's channels.

A linear step multiplies each channel by a gain (or filters it) and adds a constant. Any other step is a nonlinear
function of each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Member
from fxmerge.ir.layer_ops import LayerOp
from fxmerge.ir.provenance import Layer
from fxmerge.methods.linalg import precise


@dataclass(frozen=True)
class Step:
    """One step of a group's n channels: y = gain x + constant for each channel, or a nonlinear function.

    constant_gain:  (n,) the gain of a constant, which differs from `gain` for a filter
    features:       (n, m) unit vectors that merged channels must have in common (a filter's shape, a slope), or None
    function:       (samples, n) -> (samples, n), or None for a linear step
    norm:           for a norm of each channel alone, the (gamma, beta) of each channel, (n,), (n,)
    """

    node: str
    gain: Tensor
    constant_gain: Tensor
    constant: Tensor
    features: Tensor | None = None
    function: Callable[[Tensor], Tensor] | None = None
    norm: tuple[Tensor, Tensor] | None = None
    own_statistics: bool = False  # of a norm: whether it uses the mean and variance of its input

    def of_samples(self, x: Tensor, trained: bool = False) -> Tensor:
        """The step's output for samples of its input, (samples, n). trained: norms use the samples' statistics."""
        if self.function is not None:
            return self.function(x)
        if self.norm is not None and (self.own_statistics or trained):
            return _standard(x) * self.norm[0] + self.norm[1]
        return x * self.gain + self.constant


@dataclass(frozen=True)
class Level:
    """The channels before a step: the length of each channel's row, (n,), and its constant, (n,)."""

    length: Tensor
    constant: Tensor

    def after(self, step: Step) -> Level:
        return Level(self.length * step.gain.abs(), self.constant * step.constant_gain + step.constant)


def in_order(member: Member, n: int) -> bool:
    """Whether the layer has every channel of the group once, in the group's order."""
    return member.where.shape == (n, 1) and torch.equal(member.where[:, 0], torch.arange(n))


def laid_out(own: Tensor, member: Member, n: int, default: float) -> Tensor:
    """Expands values of the m channels in a layer, (m, ...), to all channels of the group, (n, ...)."""
    if len(own) == n:
        return own
    return own.new_full((n, *own.shape[1:]), default).index_copy_(0, member.channels, own)


def bias_of(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """The layer's bias in float64 (or complex128), or zeros if it has none."""
    out = layer.writes if layer.writes is not None else layer.carries
    assert out is not None
    if "bias" not in layer.params:
        return torch.zeros(out.numel(), dtype=torch.float64)
    return precise(tensors[layer.params["bias"]])


def slot(members: Sequence[Member], slot: str, tensors: Mapping[str, Tensor], n: int, default: float) -> Tensor:
    """One tensor of a per-channel parameter (its weight, say) for each channel, (n,): the mean over copies.

    members: of one layer
    """
    return _copies(members, slot, tensors, n, default).mean(1)


def _copies(members: Sequence[Member], slot: str, tensors: Mapping[str, Tensor], n: int, default: float) -> Tensor:
    """One tensor of a per-channel parameter for each channel and copy: (n, copies).

    A channel that has fewer copies than others has its values several times, or not at all where these do not fill the
    row: then its mean.
    """
    path = members[0].layer.params.get(slot)
    if path is None:
        return torch.full((n, 1), default, dtype=torch.float64)
    value, width = tensors[path].double().flatten(), max(m.where.size(1) for m in members)
    found = torch.full((n, width), default, dtype=torch.float64)
    for member in members:
        own = value[member.where]
        times = width // own.size(1) if width % own.size(1) == 0 else 0
        found[member.channels] = own.repeat(1, times) if times else own.mean(1, keepdim=True).expand(-1, width)
    return found


def steps_at(
    node: fx.Node, members: Sequence[Member], captured: Capture, tensors: Mapping[str, Tensor], level: Level
) -> list[Step]:
    """The steps of one node: one for each layer that it is, or one for a node without parameters."""
    n = len(level.length)
    if not members:
        one, zero = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        return [Step(node.name, one, one, zero, function=_function(node, captured, n))]
    layers: dict[int, list[Member]] = {}
    for member in members:
        layers.setdefault(id(member.layer), []).append(member)
    found = []
    for own in layers.values():
        found.append(_step_of(node, own, tensors, level))
        level = level.after(found[-1])
    return found


def _step_of(at: fx.Node, members: Sequence[Member], tensors: Mapping[str, Tensor], level: Level) -> Step:
    """The step of one layer with per-channel parameters."""
    layer, n = members[0].layer, len(level.length)
    node, op = layer.node, layer.operation
    one, zero = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    if op.is_norm:
        gamma, beta = slot(members, "weight", tensors, n, 1.0), slot(members, "bias", tensors, n, 0.0)
        if not op.is_channel_norm:
            return Step(node, gamma, gamma, beta, function=lambda x: _normalised(x, op) * gamma + beta)
        return _norm_step(members, tensors, level, beta)
    if op.is_depthwise:
        weight = tensors[layer.params["weight"]].double().flatten(1)
        gain, features = _split(_joined([weight[m.where].flatten(1) for m in members], members, n, 1.0))
        sums, bias = weight.sum(1), bias_of(layer, tensors)
        constant_gain, constant = (
            _joined([t[m.where].mean(1, keepdim=True) for m in members], members, n, default)[:, 0]
            for t, default in ((sums, 1.0), (bias, 0.0))
        )
        return Step(node, gain, constant_gain, constant, features)
    values = _copies(members, "weight", tensors, n, 0.0 if op.is_offset else 1.0)
    mean = values.mean(1)
    if op.is_scale:
        gain, features = _signed(1 / values if op.inverted else values)
        return Step(node, gain, gain, zero, features)
    if op.is_offset:
        sign = -1.0 if op.inverted == "activation" else 1.0
        return Step(node, one * sign, one * sign, -mean if op.inverted == "parameter" else mean)
    if op.name != "prelu":  # some other function of a channel and its parameter, which channels must have in common
        features = _split(torch.cat([torch.ones_like(values), values], 1))[1]
        return Step(node, one, one, zero, features, function=_with_parameter(at, mean))
    slopes = torch.cat([torch.ones_like(values), values], 1)  # channels must have the slope in common
    return Step(node, one, one, zero, _split(slopes)[1], function=lambda x: torch.where(x > 0, x, x * mean))


def _norm_step(members: Sequence[Member], tensors: Mapping[str, Tensor], level: Level, beta: Tensor) -> Step:
    """A norm of each channel alone. With statistics of its input, channels come out with the deviation gamma.

    The deviation of its input is taken as the length of the channel's row: it is the same multiple of it for all
    channels whose rows are parallel.
    """
    layer, n = members[0].layer, len(level.length)
    gamma = _copies(members, "weight", tensors, n, 1.0)
    if layer.has_running_statistics:
        gains = gamma / (_copies(members, "running_var", tensors, n, 1.0) + layer.eps).sqrt()
        mean = slot(members, "running_mean", tensors, n, 0.0)
    else:
        solid = level.length > level.length.max() * 1e-12
        gains = gamma * torch.where(solid, 1 / torch.where(solid, level.length, 1), 0.0)[:, None]
        mean = level.constant
    gain, features = (gains[:, 0], None) if gains.size(1) == 1 else _signed(gains)
    own = not layer.has_running_statistics
    return Step(layer.node, gain, gain, beta - gain * mean, features, norm=(gamma.mean(1), beta), own_statistics=own)


def _joined(parts: Sequence[Tensor], members: Sequence[Member], n: int, default: float) -> Tensor:
    """Values of each member's channels, (m, width), for all channels of the group: (n, width), filled up with zeros."""
    width = max(part.size(1) for part in parts)
    found = parts[0].new_zeros(n, width)
    found[:, 0 if len({p.size(1) for p in parts}) > 1 else slice(None)] = default
    for part, member in zip(parts, members, strict=True):
        found[member.channels] = F.pad(part, (0, width - part.size(1)))
    return found


def _signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """The gain of each channel, (n,), from those of its copies, (n, copies), and their direction, (n, copies).

    The gain has the sign of the copies' mean, so that two directions agree where one channel's gains are a multiple of
    the other's.
    """
    length, features = _split(values)
    flip = torch.where(values.mean(1) < 0, -1.0, 1.0)
    return length / values.size(1) ** 0.5 * flip, features * flip[:, None]


def _standard(x: Tensor) -> Tensor:
    """Each channel of samples, (samples, n), with mean 0 and deviation 1."""
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-12)


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
    """The output of a norm over channels, (samples, n)."""
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
    if node.target is F.linear or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return lambda x: x  # a map over positions, which does not preserve constants
    if not isinstance(source, fx.Node) or captured.shapes.get(source.name) != captured.shapes.get(node.name):
        return None
    pooling = nn.modules.pooling
    if isinstance(module, (nn.modules.dropout._DropoutNd, pooling._MaxPoolNd, pooling._AvgPoolNd)):
        return None
    if any(n.op == "get_attr" for n in node.all_input_nodes):
        return lambda x: x  # a product with a parameter that has no channels
    if any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
        return None

    @torch.no_grad()
    def apply(x: Tensor) -> Tensor:
        if module is not None:
            found = module(x.clone())
        elif node.op == "call_method":
            found = getattr(x.clone(), str(node.target))(*node.args[1:], **node.kwargs)
        else:
            found = node.target(x.clone(), *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return found.to(x)  # type: ignore[no-any-return]  # a comparison gives bool

    try:
        fits = apply(torch.zeros(2, n, dtype=torch.float64)).shape == (2, n)
    except (IndexError, RuntimeError, TypeError, ValueError):
        fits = False
    return apply if fits else lambda x: x  # the function needs the activation's own axes, and is not known here
