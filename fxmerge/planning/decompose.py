"""The decomposition of a group, as its producers and each of its consumers absorb it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Decomposition, Group, Member, Merge
from fxmerge.methods.by_moments import cellwise_least_squares, exactly, least_loss
from fxmerge.methods.decomposition import DECOMPOSITIONS, DownUp, least_squares_scales, push
from fxmerge.methods.evidence import Reading
from fxmerge.methods.generalisation import shrunk
from fxmerge.options import Options
from fxmerge.plan import GroupPlan, Partner
from fxmerge.planning.channel_ops import Step
from fxmerge.planning.statistics import Statistics, moments, moments_seen, statistics

Moments = tuple[Tensor, Tensor]  # mean (n,) and covariance (n, n)

WIDEST = 2048  # channels of a group whose moments are computed from weights; wider ones take partners by cosines alone


def decompose(
    group: Group, kept: Tensor, captured: Capture, tensors: Mapping[str, Tensor], options: Options,
    readings: Sequence[Reading] = (),
) -> tuple[DownUp | None, Merge]:  # fmt: skip
    """The group's (down, up) in its common coordinates, and what its producers and consumers absorb.

    The mapping is None if the dropped channels are not merged into kept ones.

    readings: of the group's consumers on refit's data, where there is data; else moments come from weights and norms
    """
    method = options.decomposition
    if method == "prune" or not group.consumers or unmerged(group, tensors, options):
        return None, Merge(group, kept)
    known = {reading.consumer: reading for reading in readings if reading.mean is not None}
    whole = len(known) == len(group.consumers)
    by_weights = method == "mostsim" or (method == "auto" and not whole and not _modelled(group))
    pairs = by_weights or (method == "auto" and whole)
    found = statistics(group, captured, tensors, options, kept=kept if pairs else None)
    mapping = DECOMPOSITIONS[method](found.evidence, kept)
    if by_weights and method == "auto":
        mapping = least_squares_scales(mapping)
    consumers: dict[int, Decomposition] = {}
    for numbers in served(group):
        layer = group.consumers[numbers[0]].layer
        constants = layer.takes_constants
        paths = list({group.consumers[n].steps: n for n in numbers}.values())  # one call for each way to the weight
        if method == "lstsq":
            own = mixture([moments(found, n, options.seed) for n in paths])
            up, shift = cellwise_least_squares(*_about(own, constants), kept, group.cells)
        else:
            with_shift = constants and method in ("mostsim", "auto")
            up, shift = _agreed([_pushed(mapping, kept, found, found.consumers[n], with_shift) for n in paths], kept)
        if method == "auto" and not readings and "bias" not in layer.params:
            constants = bool(shift.any())  # without refit, a bias is added only where merging is exact with it
        if method == "auto" and not by_weights:
            seen = [known[n] for n in numbers if n in known]
            exact, expected = _seen(seen, group.channels) if seen else _modelled_moments(found, paths, options.seed)
            represented = exactly((up, shift), *_about(exact, constants), kept)
            mean, covariance = _about(expected, constants)
            up, shift, loss = least_loss((up, shift), mean, covariance, kept, group.cells, represented)
            if not consumers:
                mapping = _reported(mapping, up, loss / (covariance.diagonal() + mean.square()).clamp(min=1e-300))
        part = Decomposition(up, shift if constants else torch.zeros_like(shift))
        consumers |= dict.fromkeys(numbers, part)
    in_order = tuple(consumers[number] for number in range(len(group.consumers)))
    return mapping, Merge(group, kept, mapping.down, in_order, found.producer_maps)


def served(group: Group) -> list[list[int]]:
    """The numbers of a group's consumers: together, those that are calls of one weight, which absorbs once."""
    found: dict[tuple[str, bytes], list[int]] = {}
    for number, consumer in enumerate(group.consumers):
        found.setdefault(consumer.place, []).append(number)
    return list(found.values())


def _seen(readings: Sequence[Reading], channels: int) -> tuple[Moments, Moments]:
    """The moments on data of all calls of one weight, and the same with shrunk correlations, which judge losses."""
    mean, covariance = mixture([moments_seen(reading, channels) for reading in readings])
    return (mean, covariance), (mean, shrunk(covariance, sum(reading.independent for reading in readings)))


def _modelled_moments(found: Statistics, calls: Sequence[int], seed: int) -> tuple[Moments, Moments]:
    """The moments by weights of all calls of one weight, with the norms' running statistics and with fitting ones.

    Copies are equal whichever are taken; losses are judged by the latter.
    """
    running = mixture([moments(found, n, seed) for n in calls])
    if not any(map(found.normed, calls)):
        return running, running
    return running, mixture([moments(found, n, seed, trained=True) for n in calls])


def mixture(parts: Sequence[Moments]) -> Moments:
    """Mean (n,) and covariance (n, n) over samples of which each part gives as many as any other."""
    mean = torch.stack([part[0] for part in parts]).mean(0)
    second = torch.stack([covariance + torch.outer(m - mean, m - mean) for m, covariance in parts])
    return mean, second.mean(0)


def _agreed(parts: Sequence[tuple[Tensor, Tensor]], kept: Tensor) -> tuple[Tensor, Tensor]:
    """(up, shift) of those channels for which all parts have the same; the others are only dropped."""
    (up, shift), *others = parts
    same = torch.ones(len(up), dtype=torch.bool)
    for other, moved in others:
        same &= torch.isclose(other, up, rtol=1e-9).all(1) & torch.isclose(moved, shift, rtol=1e-9)
    same[kept] = True
    return up * same[:, None], shift * same


def _modelled(group: Group) -> bool:
    """Whether moments by weights are those of the channels, which products and gated units have not."""
    gated = any(meeting.op in ("mul", "halves") for meeting in group.meetings)
    return group.channels <= WIDEST and not gated and not any(p.layer.operation.is_recurrent for p in group.producers)


def _about(known: Moments, constants: bool) -> Moments:
    """The moments that a consumer is solved with: about zero if it has no place for a constant."""
    mean, covariance = known
    return known if constants else (torch.zeros_like(mean), covariance + torch.outer(mean, mean))


def _pushed(
    mapping: DownUp, kept: Tensor, found: Statistics, steps: Sequence[Step], constants: bool
) -> tuple[Tensor, Tensor]:
    """(up, shift) of a mapping at one consumer, after its steps. constants: whether `shift` is not zero."""
    n = len(mapping.up)
    carried = mapping.up.any(1)
    carried[kept] = False
    up, shift = mapping.up, torch.zeros(n, dtype=torch.float64)
    if found.linear and constants and found.apart and not found.evidence.published:
        bias = found.evidence.bias
        shift = bias - up @ bias[kept]
    for step in steps:
        if step.function is not None:
            shift = torch.zeros_like(shift)  # a constant cannot be moved past a nonlinear function
        up, shift = push(up, shift, kept, step.gain, step.constant_gain, step.constant)
    return up, torch.where(carried, shift, 0) if constants else torch.zeros_like(shift)


def _reported(mapping: DownUp, up: Tensor, loss: Tensor) -> DownUp:
    """The mapping with the rows of the first consumer's `up`, and each channel's correlation with what replaces it."""
    return DownUp(mapping.down, up, (1 - loss).clamp(min=0).sqrt())


def unmerged(group: Group, tensors: Mapping[str, Tensor], options: Options) -> str:
    """Why the dropped channels of a group are not merged into kept ones although the options ask for it, or ""."""
    if options.decomposition == "prune" or not group.consumers:
        return ""
    if not group.partners:
        return "whole blocks, or copies of channels that do not line up"
    if options.decomposition not in ("lstsq", "auto") and _one_weight_two_ways(group):
        return "one weight is applied after different per-channel steps"
    if _complex(group.per_channel_params, tensors):
        return "per-channel parameters are complex"
    if options.decomposition in ("lstsq", "auto") and _complex((*group.producers, *group.consumers), tensors):
        return "lstsq has no statistics of complex channels"
    return ""


def _complex(members: Sequence[Member], tensors: Mapping[str, Tensor]) -> bool:
    return any(tensors[path].is_complex() for m in members for path in m.layer.params.values())


def _one_weight_two_ways(group: Group) -> bool:
    """Whether one weight serves several calls, before or after steps with different parameters.

    Then no single `down` or `up` is right for it.
    """
    members = group.params_at
    seen: dict[tuple[str, str, bytes], list[object]] = {}
    for member in (*group.producers, *group.consumers):
        passed = [(m.layer.operation, m.layer.params) for s in member.steps for m in members.get(s, ())]
        if seen.setdefault((member.role, *member.place), list(passed)) != passed:
            return True
    return False


def group_plan(group: Group, kept: Tensor, mapping: DownUp | None) -> GroupPlan:
    """The decision for a group as plain data: each dropped channel's partner is its largest entry of `up`."""
    dropped = torch.ones(group.channels, dtype=torch.bool)
    dropped[kept] = False
    if mapping is None:
        nowhere = tuple(Partner(i, -1, 0.0, 0.0) for i in dropped.nonzero().flatten().tolist())
        return GroupPlan(group.name, group.channels, tuple(kept.tolist()), nowhere)
    up = mapping.up[dropped]
    into = up.abs().argmax(1, keepdim=True)
    signed, into = up.gather(1, into)[:, 0], into[:, 0]
    columns = (dropped.nonzero().flatten(), torch.where(signed != 0, kept[into], -1), signed, mapping.cosine[dropped])
    partners = tuple(map(Partner, *(c.tolist() for c in columns)))
    return GroupPlan(group.name, group.channels, tuple(kept.tolist()), partners)
