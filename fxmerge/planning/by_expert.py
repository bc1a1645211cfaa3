"""The decomposition of a group of stacked experts, one expert after another.

The channels of different experts never merge into each other. Taken alone, an expert's channels take the memory of one
layer as wide as the expert, however many experts there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxmerge.ir.groups import Group, Member, Merge
from fxmerge.methods.decomposition import DownUp
from fxmerge.methods.evidence import Reading
from fxmerge.plan import GroupPlan
from fxmerge.planning.decompose import group_plan

Decomposed = tuple[DownUp | None, Merge]


def by_expert(
    group: Group, kept: Tensor, readings: Sequence[Reading],
    decompose: Callable[[Group, Tensor, Sequence[Reading]], Decomposed], absorb: Callable[[Merge], None],
) -> GroupPlan:  # fmt: skip
    """The plan of a group: each part of it is decomposed, and absorbed, by itself; one part but for stacked experts."""
    partners, channels = [], group.channels
    for part, own in _parts(group):
        local = torch.full((channels,), -1)
        local[own] = torch.arange(len(own))
        stays = local[kept][local[kept] >= 0]
        seen = [replace(r, channels=local[r.channels]) for r in readings if bool((local[r.channels] >= 0).all())]
        mapping, merge = decompose(part, stays, seen)
        absorb(merge)
        names = [*own.tolist(), -1]  # -1 is the place of no partner
        planned = group_plan(part, stays, mapping)
        partners += [replace(p, channel=names[p.channel], into=names[p.into]) for p in planned.partners]
    partners.sort(key=lambda p: p.channel)
    return GroupPlan(group.name, channels, tuple(kept.tolist()), tuple(partners))


def _parts(group: Group) -> Iterator[tuple[Group, Tensor]]:
    """The group of each expert's channels, and which of the group's channels these are."""
    apart = [
        m.layer.writes_apart if m.role == "write" else m.layer.reads_apart for m in (*group.producers, *group.consumers)
    ]
    if not all(apart):
        yield group, torch.arange(group.channels)
        return
    for cell in torch.unique(group.cells).tolist():
        own = (group.cells == cell).nonzero().flatten()
        local = torch.full((group.channels,), -1)
        local[own] = torch.arange(len(own))
        part = replace(
            group,
            atoms=group.atoms[own],
            cells=torch.zeros_like(own),
            blocks=(),
            producers=_of(group.producers, local),
            per_channel_params=_of(group.per_channel_params, local),
            consumers=_of(group.consumers, local),
        )
        yield part, own


def _of(members: Sequence[Member], local: Tensor) -> tuple[Member, ...]:
    """What members hold of some channels. local: the number of each channel among these, or -1"""
    here = [local[m.channels] >= 0 for m in members]
    return tuple(
        replace(m, channels=local[m.channels][h], where=m.where[h]) for m, h in zip(members, here, strict=True)
    )
