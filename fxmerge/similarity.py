"""Similarity: what a group's channels have in common, from weights and BatchNorm alone.

A writer computes channel i as row_i . input + bias_i, and what stands between it and the group's common coordinates
are per-channel steps. Each step multiplies the rows by a gain (and, where it is a filter, by the filter itself: the
inner product of two filtered rows is the product of the inner products) and moves the constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from . import linalg
from .ir import Candidates, Capture, Evidence, Group, Layer, Member, PublishedForm, Reading
from .options import Options

SAMPLES = 4096  # at least; rows of the Gaussian that stands for a group's pre-activations


@dataclass(frozen=True)
class Step:
    """One thing that a group's n channels pass: y = gain x + constant channel by channel, or a nonlinear function.

    features:   (n, m) of unit length, what channels must agree in beside the gain (a filter's shape, a slope), or None
    """

    node: str
    gain: Tensor
    constant_gain: Tensor
    constant: Tensor
    features: Tensor | None = None
    function: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Statistics:
    """A group's n channels as numbers: what to merge by, what each reader has before it."""

    evidence: Evidence
    linear: bool  # no nonlinear step before the common coordinates
    mean: Tensor  # (n,) of the common coordinates before their nonlinear steps, for white input
    covariance: Tensor  # (n, n) likewise
    functions: tuple[Step, ...]  # the nonlinear steps before the common coordinates
    readers: tuple[tuple[Step, ...], ...]  # for each reader, from the common coordinates on
    writer_maps: tuple[tuple[Tensor, Tensor, Tensor], ...]  # for each writer, (n,) gain, gain on constants, constant


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by path, shared ones under each of their paths."""
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {path: value.detach() for path, value in held}


def rows_of(member: Member, weight: Tensor, n: int) -> Tensor:
    """The writer's rows for each channel, (n, copies * fan_in); a transposed weight has its output axis second.

    Channels that the writer does not write have rows of zeros.
    """
    out_first = weight.movedim(1, 0) if member.layer.transposed else weight
    rows = out_first.flatten(1)
    if len(rows) == n and _in_order(member, n):
        return rows  # a view
    return _spread(rows[member.where].flatten(1), member, n, 0.0)


def _in_order(member: Member, n: int) -> bool:
    """Does every channel stand once, in the group's own order?"""
    return member.where.shape == (n, 1) and torch.equal(member.where[:, 0], torch.arange(n))


def _spread(own: Tensor, member: Member, n: int, default: float) -> Tensor:
    """(m, ...) of the channels that stand in a layer -> (n, ...) of the whole group."""
    if len(own) == n:
        return own
    return own.new_full((n, *own.shape[1:]), default).index_copy_(0, member.channels, own)


def candidates(
    group: Group, tensors: Mapping[str, Tensor], seed: int, readings: tuple[Reading, ...] = ()
) -> Candidates:
    """What a selector chooses a group's channels by: its writers' rows, and the first writer's kernels."""
    carriers, n = {m.layer.node: m for m in group.carriers}, group.channels
    rows = []
    for writer in group.writers:
        raw = rows_of(writer, tensors[writer.layer.params["weight"]], n)
        if "bias" in writer.layer.params and not any(_is_norm(name, carriers) for name in writer.steps):
            raw = torch.cat([raw, _spread(_bias(writer.layer, tensors)[writer.where], writer, n, 0.0).to(raw)], 1)
        rows.append(raw)
    first = group.writers[0]
    weight = tensors[first.layer.params["weight"]]
    out_first = weight.movedim(1, 0) if first.layer.transposed else weight
    in_order = _in_order(first, len(out_first))
    kernels = out_first if in_order else out_first[first.where[:, 0]]
    kernels = kernels.flatten(2) if weight.dim() > 2 else kernels[:, :, None]
    joined = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return Candidates(joined, _spread(kernels, first, n, 0.0), seed, readings)


def statistics(
    group: Group, captured: Capture, tensors: Mapping[str, Tensor], options: Options, kept: Tensor | None = None
) -> Statistics:
    """Gather a group's statistics. `tensors` are the model's parameters and buffers by path.

    kept: where only partners among these are looked for, inner products with other channels are left out.
    """
    published = options.decomposition == "mostsim" and options.mostsim_scale == "reference"
    n = group.channels
    carriers = {m.layer.node: m for m in group.carriers}
    nodes = {node.name: node for node in captured.module.graph.nodes}

    def steps_of(names: tuple[str, ...]) -> tuple[Step, ...]:
        return tuple(_step(nodes[name], carriers.get(name), captured, tensors, n) for name in names)

    inner, covariance = (torch.zeros(n, n, dtype=torch.float64) for _ in range(2))
    mean = torch.zeros(n, dtype=torch.float64)
    bias, maps, linear = torch.zeros(n, dtype=torch.float64), [], True
    functions: tuple[Step, ...] = ()
    normed = any(_is_norm(name, carriers) for w in group.writers for name in w.steps)
    form = None
    for writer in group.writers:
        raw = rows_of(writer, tensors[writer.layer.params["weight"]], n)
        spread = linalg.gram(raw, kept)
        constants = _spread(_bias(writer.layer, tensors)[writer.where], writer, n, 0.0)  # (n, copies)
        # without a BatchNorm anywhere the constants are one more column, as in the paper; with one they count apart
        own = spread if normed else spread + linalg.gram(constants, kept)
        constant = constants.mean(1) if normed else torch.zeros(n, dtype=torch.float64)
        level = constants.mean(1)
        steps = steps_of(writer.steps)
        gain, constant_gain = torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        moved = torch.zeros(n, dtype=torch.float64)
        if published and len(group.writers) == 1 and steps and _is_norm(writer.steps[0], carriers):
            form = _published(spread, carriers[writer.steps[0]], tensors, n)
        for step in steps:
            factor = step.gain[:, None] * step.gain[None, :]
            if step.features is not None:
                factor = factor * linalg.gram(step.features)
            own = own * factor
            constant = step.constant_gain * constant + step.constant
            moved = step.constant_gain * moved + step.constant
            level = step.constant_gain * level + step.constant
            gain, constant_gain = gain * step.gain, constant_gain * step.constant_gain
            if kept is None:
                spread = spread * factor
            if _is_norm(step.node, carriers):
                spread = _unit(spread, _gamma(carriers[step.node], tensors, n)) if kept is None else spread
                level = _slot(carriers[step.node], "bias", tensors, n, 0.0)
            linear &= step.function is None
        functions = tuple(s for s in steps if s.function is not None)
        maps.append((gain, constant_gain, moved))
        inner, bias = inner + own, bias + constant
        mean, covariance = mean + level, covariance + spread
    return Statistics(
        Evidence(inner, bias, normed, group.cells, not group.scale_blocks, options.threshold, options.lam, form),
        linear, mean, covariance, functions, tuple(steps_of(r.steps) for r in group.readers), tuple(maps),
    )  # fmt: skip


def moments(found: Statistics, reader: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of a group's channels as one reader sees them.

    The common coordinates are Gaussian, with the rows' covariance (each BatchNorm's output has mean beta and deviation
    |gamma|; without one the input counts as white); what follows is sampled, so that any activation will do.
    """
    generator = torch.Generator().manual_seed(seed)
    points = linalg.coordinates(found.covariance)
    count = max(SAMPLES, 4 * len(points))
    noise = torch.randn(count // 2, points.size(1), generator=generator, dtype=torch.float64)
    values = torch.cat([noise, -noise]) @ points.T + found.mean
    for step in (*found.functions, *found.readers[reader]):
        values = step.function(values) if step.function is not None else values * step.gain + step.constant
    mean = values.mean(0)
    centred = values - mean
    return mean, centred.T @ centred / count


def _bias(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    out = layer.writes if layer.writes is not None else layer.carries
    assert out is not None
    return tensors[layer.params["bias"]].double() if "bias" in layer.params else torch.zeros(out.numel()).double()


def _is_norm(node: str, carriers: Mapping[str, Member]) -> bool:
    return node in carriers and carriers[node].layer.op == "batch_norm"


def _slot(member: Member, slot: str, tensors: Mapping[str, Tensor], n: int, default: float) -> Tensor:
    """A carrier's parameter for each channel, (n,): the mean over copies."""
    path = member.layer.params.get(slot)
    if path is None:
        return torch.full((n,), default, dtype=torch.float64)
    return _spread(tensors[path].double().flatten()[member.where].mean(1), member, n, default)


def _gamma(member: Member, tensors: Mapping[str, Tensor], n: int) -> Tensor:
    return _slot(member, "weight", tensors, n, 1.0)


def _unit(inner: Tensor, deviation: Tensor) -> Tensor:
    """A covariance with the correlations of `inner` and the given deviations."""
    scale = deviation.abs() / inner.diagonal().clamp(min=1e-300).sqrt()
    return scale[:, None] * inner * scale[None, :]


def _published(inner: Tensor, norm: Member, tensors: Mapping[str, Tensor], n: int) -> PublishedForm:
    return PublishedForm(
        inner,
        _gamma(norm, tensors, n),
        _slot(norm, "bias", tensors, n, 0.0),
        _slot(norm, "running_mean", tensors, n, 0.0),
        _slot(norm, "running_var", tensors, n, 1.0),
    )


def _step(node: fx.Node, carrier: Member | None, captured: Capture, tensors: Mapping[str, Tensor], n: int) -> Step:
    """What one node does to a group's channels."""
    one, zero = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    if carrier is None:
        return Step(node.name, one, one, zero, None, _function(node, captured))
    op = carrier.layer.op
    if op in ("layer_norm", "rms_norm", "group_norm", "instance_norm"):
        gain, constant = _gamma(carrier, tensors, n), _slot(carrier, "bias", tensors, n, 0.0)
        return Step(node.name, gain, gain, constant, None, lambda x: _normalised(x, op) * gain + constant)
    if op == "batch_norm":
        bn_std = (_slot(carrier, "running_var", tensors, n, 1.0) + carrier.layer.eps).sqrt()
        gain = _gamma(carrier, tensors, n) / bn_std
        constant = _slot(carrier, "bias", tensors, n, 0.0) - gain * _slot(carrier, "running_mean", tensors, n, 0.0)
        return Step(node.name, gain, gain, constant)
    weight = tensors[carrier.layer.params["weight"]].double()
    if op == "depthwise":
        own = weight.flatten(1)[carrier.where].flatten(1)  # (m, copies * kernel)
        filters = _spread(own, carrier, n, 1.0)
        gain, features = _split(filters)
        constant = _spread(_bias(carrier.layer, tensors)[carrier.where].mean(1), carrier, n, 0.0)
        return Step(node.name, gain, filters.sum(1) / carrier.where.size(1), constant, features)
    neutral = 0.0 if op.startswith("offset") else 1.0
    values = _spread(weight.flatten()[carrier.where], carrier, n, neutral)  # (n, copies)
    mean = values.mean(1)
    if op in ("scale", "scale/"):
        length, features = _split(values if op == "scale" else 1 / values)
        gain = length / values.size(1) ** 0.5
        flip = torch.where(mean < 0, -1.0, 1.0)
        return Step(node.name, gain * flip, gain * flip, zero, features * flip[:, None])
    if op in ("offset", "offset-", "offset-r"):
        sign = -1.0 if op == "offset-r" else 1.0
        return Step(node.name, one * sign, one * sign, -mean if op == "offset-" else mean)
    if op != "prelu":  # some other function of a channel and its parameter: agree in the parameter
        return Step(node.name, one, one, zero, _split(values)[1])
    slopes = torch.cat([torch.ones_like(values), values], 1)  # agree in the slope
    return Step(node.name, one, one, zero, _split(slopes)[1], lambda x: torch.where(x > 0, x, x * mean))


def _normalised(x: Tensor, op: str) -> Tensor:
    """(samples, n) as a norm over channels leaves it; an InstanceNorm leaves each channel with deviation 1."""
    if op == "instance_norm":
        return (x - x.mean(0)) / x.std(0).clamp(min=1e-12)
    centred = x if op == "rms_norm" else x - x.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


def _split(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as (length, direction): (n, m) -> (n,), (n, m)."""
    length = torch.linalg.vector_norm(filters, dim=1)
    return length, filters / length.clamp(min=1e-300)[:, None]


def _function(node: fx.Node, captured: Capture) -> Callable[[Tensor], Tensor] | None:
    """The node as a function of (samples, n), or None where it is linear for each channel (pooling, dropout)."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or captured.shapes.get(source.name) != captured.shapes.get(node.name):
        return None
    module = captured.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    pooling = nn.modules.pooling
    if isinstance(module, (nn.modules.dropout._DropoutNd, pooling._MaxPoolNd, pooling._AvgPoolNd)):
        return None
    if any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
        return None

    def apply(x: Tensor) -> Tensor:
        if module is not None:
            return module(x.clone()).to(x)  # type: ignore[no-any-return]
        if node.op == "call_method":
            return getattr(x.clone(), str(node.target))(*node.args[1:], **node.kwargs)  # type: ignore[no-any-return]
        return node.target(x.clone(), *node.args[1:], **node.kwargs)  # type: ignore[operator,no-any-return]

    return apply
