"""The decomposition of a group, as its producers and each of its consumers absorb it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Decomposition, Group, Merge
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
    if method == "prune" or not group.partners or not group.consumers or _shared_consumer(group):
        return None, Merge(group, kept)
    found = statistics(group, captured, tensors, options, kept if method == "mostsim" else None)
    mapping = DECOMPOSITIONS[method](found.evidence, kept)
    n = group.channels
    carried = mapping.up.any(1)
    carried[kept] = False
    consumers = []
    for number, steps in enumerate(found.consumers):
        if method == "lstsq":
            up, shift = cellwise_least_squares(*moments(found, number, options.seed), kept, group.cells)
        else:
            up, shift = mapping.up, torch.zeros(n, dtype=torch.float64)
            if found.linear and method == "mostsim" and found.evidence.centred and not found.evidence.published:
                bias = found.evidence.bias
                shift = bias - up @ bias[kept]
            for step in steps:
                if step.function is not None:
                    shift = torch.zeros_like(shift)  # a constant cannot be moved past a nonlinear function
                up, shift = push(up, shift, kept, step.gain, step.constant_gain, constant=step.constant)
            shift = torch.where(carried, shift, 0) if method == "mostsim" else torch.zeros_like(shift)
        consumers.append(Decomposition(up, shift))
    return mapping, Merge(group, kept, mapping.down, tuple(consumers), found.producer_maps)


def _shared_consumer(group: Group) -> bool:
    """Whether one weight is applied after different per-channel steps, so that no single `up` is right for it."""
    per_channel_params = {m.layer.node for m in group.per_channel_params}
    seen: dict[str, list[str]] = {}
    for consumer in group.consumers:
        passed = [s for s in consumer.steps if s in per_channel_params]
        if seen.setdefault(consumer.layer.params["weight"], passed) != passed:
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
