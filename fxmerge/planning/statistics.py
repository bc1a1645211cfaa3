"""Statistics of a group's channels, computed from weights and BatchNorms alone.

A producer computes channel i as row_i . input + bias_i. Between a producer and the group's common coordinates there are
per-channel steps (`channel_ops`). Each step multiplies the rows by a gain, or by a filter (the inner product of two
filtered rows is the product of the inner products of rows and of filters), and changes the constants.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Member
from fxmerge.methods import linalg
from fxmerge.methods.evidence import Evidence, PublishedForm, Reading
from fxmerge.methods.least_squares import second_moments
from fxmerge.methods.linalg import as_real
from fxmerge.options import Options
from fxmerge.planning.channel_ops import Level, Step, bias_of, in_order, laid_out, slot, steps_at
from fxmerge.planning.sources import Source, added, shares
from fxmerge.weights.layout import out_first

SAMPLES = 4096  # smallest number of samples of the Gaussian that models a group's pre-activations


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is known of a group's n channels, for its decomposition and for the moments at each consumer."""

    evidence: Evidence
    linear: bool  # whether there is no nonlinear step before the common coordinates
    apart: bool  # whether `evidence.bias` holds all constants, and the rows none
    sources: tuple[Source, ...]  # whose sum the channels are; none if `statistics` was called with `kept`
    consumers: tuple[tuple[Step, ...], ...]  # for each consumer, its steps after the common coordinates
    producer_maps: tuple[
        tuple[Tensor, Tensor, Tensor], ...
    ]  # for each producer: gain, gain on constants, constant (n,)
    drawn: dict[tuple[int, bool], Tensor] = field(default_factory=dict)  # what `samples` has drawn so far

    def samples(self, seed: int, trained: bool) -> Tensor:
        """(count, n) samples of the channels in their common coordinates. They are drawn once."""
        assert self.sources  # `statistics` was called without `kept`
        if (seed, trained) not in self.drawn:
            generator = torch.Generator().manual_seed(seed)
            count = max(SAMPLES, 4 * len(self.evidence.bias))
            parts = (source.samples(count, trained, generator) for source in self.sources)
            self.drawn[seed, trained] = reduce(operator.add, parts)
        return self.drawn[seed, trained]

    def normed(self, consumer: int) -> bool:
        """Whether samples at a consumer pass through a norm that uses running statistics."""
        steps = [*(step for source in self.sources for step in source.functions), *self.consumers[consumer]]
        return any(step.norm is not None and not step.own_statistics for step in steps)


def state(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by path; a shared tensor is listed under each of its paths."""
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {path: value.detach() for path, value in held}


def producer_rows(member: Member, weight: Tensor, n: int) -> Tensor:
    """A producer's rows for each channel of its group, (n, copies * fan_in).

    A transposed weight has its output axis second. Channels that the producer does not write have rows of zeros. A
    complex weight has rows of real and imaginary parts, so that their inner products are the real parts of those of
    the complex rows.
    """
    rows = as_real(out_first(weight, member.layer)).flatten(1)
    if len(rows) == n and in_order(member, n):
        return rows  # a view
    return laid_out(rows[member.where].flatten(1), member, n, 0.0)


def producer_constants(member: Member, tensors: Mapping[str, Tensor], n: int) -> Tensor:
    """A producer's bias for each channel and copy, (n, copies), or of twice as many columns if it is complex."""
    return laid_out(as_real(bias_of(member.layer, tensors)[member.where]).flatten(1), member, n, 0.0)


def statistics(
    group: Group,
    captured: Capture,
    tensors: Mapping[str, Tensor],
    options: Options,
    *,
    kept: Tensor | None = None,
    sample: Tensor | None = None,
) -> Statistics:
    """The statistics of a group. `tensors` are the model's parameters and buffers by path.

    kept:    restricts the inner products to pairs of a dropped and a kept channel, which is enough to find partners
    sample:  restricts them to pairs of these channels, (m,)
    """
    published = options.decomposition in ("mostsim", "auto") and options.mostsim_scale == "reference"
    n = group.channels
    members = group.params_at
    nodes = {node.name: node for node in captured.module.graph.nodes}

    def steps_of(names: Sequence[str], level: Level) -> Iterator[Step]:
        for name in names:
            for step in steps_at(nodes[name], members.get(name, ()), captured, tensors, level):
                yield step
                level = level.after(step)

    def gram(rows: Tensor) -> Any:  # (n, n), or `Pairs`: both can be added and multiplied
        if kept is not None:
            return linalg.across(rows, kept)
        return linalg.gram(rows if sample is None else rows[sample])

    inner: list[Any] = []
    whole = kept is None and sample is None
    zeros = torch.zeros(n, dtype=torch.float64)
    bias, constants, square = zeros, zeros, zeros
    sources: list[Source] = []
    maps, linear = [], not any(meeting.op in ("mul", "halves") for meeting in group.meetings)
    normed = any(is_norm(name, members) for w in group.producers for name in w.steps)
    apart = normed or _constants_cancel(group)
    norms = [m.layer for m in group.per_channel_params if m.layer.operation.is_channel_norm]
    measured = not all(layer.has_running_statistics for layer in norms)  # is the length of rows needed?
    form = None
    for producer, share in zip(group.producers, shares(group), strict=True):
        raw = producer_rows(producer, tensors[producer.layer.params["weight"]], n)
        spread = raw_pairs = gram(raw)
        columns = producer_constants(producer, tensors, n)
        # without a BatchNorm the constants are one more column of the rows, as in the paper; else they are kept apart
        own = spread if apart else spread + gram(columns)
        length = torch.linalg.vector_norm(raw.double(), dim=1) if measured else torch.ones_like(zeros)
        start = Level(length, columns.mean(1))
        constant = start.constant if apart else zeros
        level, moved, gain, constant_gain = start.constant, zeros, torch.ones_like(zeros), torch.ones_like(zeros)
        steps, now, passed = tuple(steps_of(producer.steps, start)), start, False
        if published and len(group.producers) == 1 and steps and is_norm(producer.steps[0], members):
            form = _published(members[producer.steps[0]], tensors, n)
        for step in steps:
            if step.features is not None:
                agreement = gram(step.features)
                own = own * agreement
                spread = spread if passed else spread * agreement
            constant, moved = (step.constant_gain * c + step.constant for c in (constant, moved))
            linear &= step.function is None
            passed |= step.function is not None
            gain, constant_gain = gain * step.gain, constant_gain * step.constant_gain
            now = now.after(step)
            if passed:
                continue  # what follows the first nonlinear step is applied to samples
            level = step.constant_gain * level + step.constant
            if whole:
                spread = spread * gram(step.gain[:, None])
            if step.norm is not None:
                gamma, level = step.norm
                if whole:
                    spread = _unit(spread, gamma)
        first = next((at for at, s in enumerate(steps) if s.function is not None), len(steps))
        maps.append((gain, constant_gain, moved))
        weight = share.abs().sqrt()
        inner.append(raw_pairs if form is not None else own * gram((weight * gain)[:, None]))
        bias, constants = bias + share * constant, constants + share * now.constant
        square = square + share.abs() * now.length.square()
        if whole:
            sources.append(Source(share, level, spread, steps[first:]))
    evidence = Evidence(
        inner=reduce(operator.add, inner),
        bias=bias,
        centred=normed,
        cells=group.cells,
        scalable=not group.scale_blocks,
        threshold=options.threshold,
        lam=options.lam,
        published=form,
    )
    level_after = Level(square.sqrt(), constants)
    return Statistics(
        evidence=evidence,
        linear=linear,
        apart=apart,
        sources=added(group, sources),
        consumers=tuple(tuple(steps_of(r.steps, level_after)) for r in group.consumers),
        producer_maps=tuple(maps),
    )


def moments(found: Statistics, consumer: int, seed: int, trained: bool = False) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of a group's channels at the input of one consumer.

    The common coordinates are taken as Gaussian, with the covariance of the rows: a BatchNorm's output has mean beta
    and deviation |gamma|; without a BatchNorm the input is taken as white. The steps after them are applied to samples,
    so that the activation can be any function.

    trained: whether the running statistics of BatchNorms among these steps are taken to be those of their inputs, which
             the model of the inputs does not know. Outputs then have the mean beta and the deviation |gamma|
    """
    values = found.samples(seed, trained)
    for step in found.consumers[consumer]:
        values = step.of_samples(values, trained)
    mean, second = second_moments([values[:, None]], lambda total: total)
    return mean[0], second[0]


def moments_seen(reading: Reading, n: int) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of a group's channels in the patches of a consumer, over all places of a patch.

    Channels that the consumer does not read are 0.
    """
    assert reading.mean is not None
    gram, mean, at = reading.gram.double(), reading.mean.double(), reading.channels
    level, second = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    level[at] = mean[reading.columns].mean(1)
    total = torch.zeros(len(at), len(at), dtype=torch.float64)
    for place in reading.columns.T:
        off = mean[place] - level[at]
        total += gram[place[:, None], place[None, :]] + torch.outer(off, off)
    second[at[:, None], at[None, :]] = total / reading.columns.size(1)
    return level, second


def is_norm(node: str, members: Mapping[str, Sequence[Member]]) -> bool:
    return any(member.layer.operation.is_channel_norm for member in members.get(node, ()))


def _constants_cancel(group: Group) -> bool:
    """Whether every consumer's path begins with a norm that subtracts the mean of its input."""
    own = {
        m.layer.node
        for m in group.per_channel_params
        if m.layer.operation.is_channel_norm and not m.layer.has_running_statistics
    }
    return bool(group.consumers) and all(c.steps and c.steps[0] in own for c in group.consumers)


def _unit(inner: Tensor, deviation: Tensor) -> Tensor:
    """A covariance with the correlations of `inner` and the given deviations."""
    scale = deviation.abs() / inner.diagonal().clamp(min=1e-300).sqrt()
    return scale[:, None] * inner * scale[None, :]


def _published(norm: Sequence[Member], tensors: Mapping[str, Tensor], n: int) -> PublishedForm | None:
    if not norm[0].layer.has_running_statistics:
        return None
    return PublishedForm(
        gamma=slot(norm, "weight", tensors, n, 1.0),
        beta=slot(norm, "bias", tensors, n, 0.0),
        mean=slot(norm, "running_mean", tensors, n, 0.0),
        var=slot(norm, "running_var", tensors, n, 1.0),
    )
