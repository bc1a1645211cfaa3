"""The decomposition of a group, as its producers and each of its consumers absorb it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Decomposition, Group, Member, Merge
from fxmerge.methods.decomposition import DECOMPOSITIONS, DownUp, cellwise_least_squares, push
from fxmerge.options import Options
from fxmerge.plan import GroupPlan, Partner
from fxmerge.planning.statistics import moments, statistics


def decompose(
    group: Group, kept: Tensor, captured: Capture, tensors: Mapping[str, Tensor], options: Options
) -> tuple[DownUp | None, Merge]:
    """The group's (down, up) in its common coordinates, and what its producers and consumers absorb.

    The mapping is None if the dropped channels are not merged into kept ones.
    """
    method = options.decomposition
    if method == "prune" or not group.consumers or unmerged(group, tensors, options):
        return None, Merge(group, kept)
    found = statistics(group, captured, tensors, options, kept=kept if method == "mostsim" else None)
    mapping = DECOMPOSITIONS[method](found.evidence, kept)
    n = group.channels
    carried = mapping.up.any(1)
    carried[kept] = False
    consumers = []
    for number, (consumer, steps) in enumerate(zip(group.consumers, found.consumers, strict=True)):
        if method == "lstsq":
            mean, covariance = moments(found, number, options.seed)
            if consumer.layer.is_stacked:  # which has no place for a constant: solved about zero
                mean, covariance = torch.zeros_like(mean), covariance + torch.outer(mean, mean)
            up, shift = cellwise_least_squares(mean, covariance, kept, group.cells)
        else:
            up, shift = mapping.up, torch.zeros(n, dtype=torch.float64)
            if found.linear and method == "mostsim" and found.apart and not found.evidence.published:
                bias = found.evidence.bias
                shift = bias - up @ bias[kept]
            for step in steps:
                if step.function is not None:
                    shift = torch.zeros_like(shift)  # a constant cannot be moved past a nonlinear function
                up, shift = push(up, shift, kept, step.gain, step.constant_gain, step.constant)
            moves = method == "mostsim" and not consumer.layer.is_stacked
            shift = torch.where(carried, shift, 0) if moves else torch.zeros_like(shift)
        consumers.append(Decomposition(up, shift))
    return mapping, Merge(group, kept, mapping.down, tuple(consumers), found.producer_maps)


def unmerged(group: Group, tensors: Mapping[str, Tensor], options: Options) -> str:
    """Why the dropped channels of a group are not merged into kept ones although the options ask for it, or ""."""
    if options.decomposition == "prune" or not group.consumers:
        return ""
    if not group.partners:
        return "whole blocks, or copies of channels that do not line up"
    if _one_weight_two_ways(group):
        return "one weight is applied after different per-channel steps"
    if _complex(group.per_channel_params, tensors):
        return "per-channel parameters are complex"
    if options.decomposition == "lstsq" and _complex((*group.producers, *group.consumers), tensors):
        return "lstsq has no statistics of complex channels"
    return ""


def _complex(members: Sequence[Member], tensors: Mapping[str, Tensor]) -> bool:
    return any(tensors[path].is_complex() for m in members for path in m.layer.params.values())


def _one_weight_two_ways(group: Group) -> bool:
    """Whether one weight serves several calls, before or after steps with different parameters.

    Then no single `down` or `up` is right for it.
    """
    members = group.params_at
    seen: dict[tuple[str, bytes], list[object]] = {}
    for member in (*group.producers, *group.consumers):
        passed = [(m.layer.operation, m.layer.params) for s in member.steps for m in members.get(s, ())]
        held = (member.role + member.layer.params["weight"], member.where.numpy().tobytes())
        if seen.setdefault(held, list(passed)) != passed:
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
