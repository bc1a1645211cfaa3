"""Statistics of a group's channels, computed from weights and BatchNorms alone.

A producer computes channel i as row_i . input + bias_i. Between a producer and the group's common coordinates there are
per-channel steps (`channel_ops`). Each step multiplies the rows by a gain, or by a filter (the inner product of two
filtered rows is the product of the inner products of rows and of filters), and changes the constants.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Member
from fxmerge.methods import linalg
from fxmerge.methods.evidence import Candidates, Evidence, PublishedForm, Reading
from fxmerge.methods.least_squares import second_moments
from fxmerge.options import Options
from fxmerge.planning.channel_ops import Step, bias_of, gamma_of, in_order, laid_out, slot, step_of
from fxmerge.weights.layout import out_first

SAMPLES = 4096  # smallest number of samples of the Gaussian that models a group's pre-activations


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is known of a group's n channels, for its decomposition and for the moments at each consumer."""

    evidence: Evidence
    linear: bool  # whether there is no nonlinear step before the common coordinates
    mean: Tensor  # (n,) of the common coordinates before their nonlinear steps, for white input
    covariance: Tensor | None  # (n, n) of the same; None if `statistics` was called with `kept`
    functions: tuple[Step, ...]  # the nonlinear steps before the common coordinates
    consumers: tuple[tuple[Step, ...], ...]  # for each consumer, its steps after the common coordinates
    producer_maps: tuple[
        tuple[Tensor, Tensor, Tensor], ...
    ]  # for each producer: gain, gain on constants, constant (n,)


def state(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by path; a shared tensor is listed under each of its paths."""
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {path: value.detach() for path, value in held}


def producer_rows(member: Member, weight: Tensor, n: int) -> Tensor:
    """A producer's rows for each channel of its group, (n, copies * fan_in).

    A transposed weight has its output axis second. Channels that the producer does not write have rows of zeros.
    """
    rows = out_first(weight, member.layer).flatten(1)
    if len(rows) == n and in_order(member, n):
        return rows  # a view
    return laid_out(rows[member.where].flatten(1), member, n, 0.0)


def candidates(
    group: Group, tensors: Mapping[str, Tensor], seed: int, readings: tuple[Reading, ...] = ()
) -> Candidates:
    """The input of a selector: the rows of a group's producers, and the kernels of the first producer."""
    per_channel_params, n = {m.layer.node: m for m in group.per_channel_params}, group.channels
    rows = []
    for producer in group.producers:
        raw = producer_rows(producer, tensors[producer.layer.params["weight"]], n)
        rows.append(raw)
        if "bias" in producer.layer.params and not any(_is_norm(name, per_channel_params) for name in producer.steps):
            rows.append(laid_out(bias_of(producer.layer, tensors)[producer.where], producer, n, 0.0).to(raw))
    first = group.producers[0]
    weight = tensors[first.layer.params["weight"]]
    filters = out_first(weight, first.layer)
    kernels = filters if in_order(first, len(filters)) else filters[first.where[:, 0]]
    kernels = kernels.flatten(2) if weight.dim() > 2 else kernels[:, :, None]
    return Candidates(tuple(rows), laid_out(kernels, first, n, 0.0), seed, readings)


def statistics(
    group: Group, captured: Capture, tensors: Mapping[str, Tensor], options: Options, kept: Tensor | None = None
) -> Statistics:
    """The statistics of a group. `tensors` are the model's parameters and buffers by path.

    kept: restricts the inner products to pairs of a dropped and a kept channel, which is enough to find partners.
    """
    published = options.decomposition == "mostsim" and options.mostsim_scale == "reference"
    n = group.channels
    per_channel_params = {m.layer.node: m for m in group.per_channel_params}
    nodes = {node.name: node for node in captured.module.graph.nodes}

    def steps_of(names: tuple[str, ...]) -> tuple[Step, ...]:
        return tuple(step_of(nodes[name], per_channel_params.get(name), captured, tensors, n) for name in names)

    def gram(rows: Tensor) -> Any:  # (n, n), or `Pairs`: both can be added and multiplied
        return linalg.gram(rows) if kept is None else linalg.across(rows, kept)

    inner: list[Any] = []
    covariance = torch.zeros(n, n, dtype=torch.float64) if kept is None else None
    mean = torch.zeros(n, dtype=torch.float64)
    bias, maps, linear = torch.zeros(n, dtype=torch.float64), [], True
    functions: tuple[Step, ...] = ()
    normed = any(_is_norm(name, per_channel_params) for w in group.producers for name in w.steps)
    form = None
    for producer in group.producers:
        raw = producer_rows(producer, tensors[producer.layer.params["weight"]], n)
        spread = raw_pairs = gram(raw)
        constants = laid_out(bias_of(producer.layer, tensors)[producer.where], producer, n, 0.0)  # (n, copies)
        # without a BatchNorm the constants are one more column of the rows, as in the paper; else they are kept apart
        own = spread if normed else spread + gram(constants)
        constant = constants.mean(1) if normed else torch.zeros(n, dtype=torch.float64)
        level = constants.mean(1)
        steps = steps_of(producer.steps)
        gain, constant_gain = torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        moved = torch.zeros(n, dtype=torch.float64)
        if published and len(group.producers) == 1 and steps and _is_norm(producer.steps[0], per_channel_params):
            form = _published(per_channel_params[producer.steps[0]], tensors, n)
        for step in steps:
            if step.features is not None:
                agreement = gram(step.features)
                own = own * agreement
                spread = spread * agreement
            constant = step.constant_gain * constant + step.constant
            moved = step.constant_gain * moved + step.constant
            level = step.constant_gain * level + step.constant
            gain, constant_gain = gain * step.gain, constant_gain * step.constant_gain
            if covariance is not None:
                spread = spread * gram(step.gain[:, None])
            if _is_norm(step.node, per_channel_params):
                if covariance is not None:
                    spread = _unit(spread, gamma_of(per_channel_params[step.node], tensors, n))
                level = slot(per_channel_params[step.node], "bias", tensors, n, 0.0)
            linear &= step.function is None
        functions = tuple(s for s in steps if s.function is not None)
        maps.append((gain, constant_gain, moved))
        inner.append(raw_pairs if form is not None else own * gram(gain[:, None]))
        bias, mean = bias + constant, mean + level
        covariance = covariance + spread if covariance is not None else None
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
    return Statistics(
        evidence=evidence,
        linear=linear,
        mean=mean,
        covariance=covariance,
        functions=functions,
        consumers=tuple(steps_of(r.steps) for r in group.consumers),
        producer_maps=tuple(maps),
    )


def moments(found: Statistics, consumer: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (n,) and covariance (n, n) of a group's channels at the input of one consumer.

    The common coordinates are taken as Gaussian, with the covariance of the rows: a BatchNorm's output has mean beta
    and deviation |gamma|; without a BatchNorm the input is taken as white. The steps after them are applied to samples,
    so that the activation can be any function.
    """
    generator = torch.Generator().manual_seed(seed)
    assert found.covariance is not None  # `statistics` was called without `kept`
    points = linalg.coordinates(found.covariance)
    count = max(SAMPLES, 4 * len(points))
    noise = torch.randn(count // 2, points.size(1), generator=generator, dtype=torch.float64)
    values = torch.cat([noise, -noise]) @ points.T + found.mean
    for step in (*found.functions, *found.consumers[consumer]):
        values = step.function(values) if step.function is not None else values * step.gain + step.constant
    mean, second = second_moments([values[:, None]], lambda total: total)
    return mean[0], second[0]


def _is_norm(node: str, per_channel_params: Mapping[str, Member]) -> bool:
    return node in per_channel_params and per_channel_params[node].layer.op == "batch_norm"


def _unit(inner: Tensor, deviation: Tensor) -> Tensor:
    """A covariance with the correlations of `inner` and the given deviations."""
    scale = deviation.abs() / inner.diagonal().clamp(min=1e-300).sqrt()
    return scale[:, None] * inner * scale[None, :]


def _published(norm: Member, tensors: Mapping[str, Tensor], n: int) -> PublishedForm:
    return PublishedForm(
        gamma=gamma_of(norm, tensors, n),
        beta=slot(norm, "bias", tensors, n, 0.0),
        mean=slot(norm, "running_mean", tensors, n, 0.0),
        var=slot(norm, "running_var", tensors, n, 1.0),
    )
