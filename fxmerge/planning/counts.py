"""The numbers of channels that a group keeps under a ratio, or may keep under a budget.

A group's cells keep their channels independently, except where blocks tie the cells together. The numbers that a group
may keep under a budget are its ladder (see `methods/allocation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch

from fxmerge.analysis.feasible import all_of, spread
from fxmerge.analysis.head_widths import HeadWidth
from fxmerge.errors import FxMergeError
from fxmerge.ir.groups import Group
from fxmerge.methods.allocation import Floats
from fxmerge.options import Options

RUNGS = 256  # approximate largest number of rungs of a ladder with equal cells
TRIED = 17  # shares that are tried for a ladder with unequal cells


def by_ratio(
    groups: Sequence[Group],
    options: Options,
    overlaps: Mapping[str, Mapping[str, float]],
    heads: Sequence[HeadWidth] = (),
) -> dict[str, tuple[int, ...]]:
    """{group: channels kept in each cell}, where each group keeps the share s = 1 - ratio, or as `keep` says.

    overlaps: {group: {group of whole blocks: share of the former's channels that are in the latter's blocks}}. Where
    some blocks are removed and the others are narrowed, the share s is kept in all: sqrt(s) of the blocks, and the rest
    of the reduction in the width of the kept blocks.
    heads: attentions whose values, if the two differ by rounding only, are given the width of the queries
    """
    share, kept = 1 - options.ratio, dict[str, tuple[int, ...]]()
    left: dict[str, float] = {}  # share of each group that is kept
    free: dict[str, Group] = {}  # the groups whose width `keep` does not say
    doubled = {name for g in groups for name in overlaps.get(g.name, ())}
    for group in sorted(groups, key=lambda g: g.name not in doubled):  # blocks first: the others depend on them
        gone = sum(part * (1 - left.get(name, 1)) for name, part in overlaps.get(group.name, {}).items())
        own = math.sqrt(share) if group.name in doubled else min(1.0, share / (1 - gone))
        asked = _asked(group, options)
        kept[group.name] = spread(group, own, step_of(group, options)) or all_of(group) if asked is None else asked
        left[group.name] = sum(kept[group.name]) / group.channels
        if asked is None:
            free[group.name] = group
    for head in heads if options.round_to == 1 and not doubled else ():
        if {head.values, head.queries} <= free.keys():
            kept[head.values] = _as_wide(head, free[head.values], free[head.queries], kept)
    return kept


def _as_wide(head: HeadWidth, values: Group, queries: Group, kept: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Channels of the values to keep in each cell: as many as places of a query's head stay, if it is one off."""
    sizes, width, own = torch.bincount(queries.cells), sum(head.places.values()), list(kept[head.values])
    places = sum(kept[head.queries][cell] * n / int(sizes[cell]) for cell, n in head.places.items())
    whole = {int((values.cells == cell).sum()) for cell in head.cells} == {width}
    if whole and places == round(places) and all(abs(places - own[cell]) <= 1 for cell in head.cells):
        for cell in head.cells:
            own[cell] = round(places)
    return tuple(own)


def step_of(group: Group, options: Options) -> int:
    """The number that the channels which a group keeps are a multiple of."""
    return math.lcm(options.round_to, group.multiple * len(set(group.cells.tolist())) if group.multiple > 1 else 1)


def _asked(group: Group, options: Options) -> tuple[int, ...] | None:
    """Channels kept in each cell, as `keep` says; None if no pattern matches the group."""
    asked = next((v for pattern, v in options.keep.items() if fnmatchcase(group.name, pattern)), None)
    if not isinstance(asked, int):
        return None if asked is None else spread(group, asked, step_of(group, options)) or all_of(group)
    counts = spread(group, asked / group.channels, 1, asked) if asked <= group.channels else None
    if counts is None:
        cells = f", in {len(set(group.cells.tolist()))} cells of connected blocks" if group.blocks else ""
        raise FxMergeError(f"keep asks for {asked} channels of {group.name}, which has {group.channels}{cells}")
    return counts


def nearest(ladder: Floats, share: float) -> int:
    """The rung that keeps about this share of the channels; not the one that keeps all, if there is another."""
    kept = ladder.sum(1) / ladder[0].sum()
    return max(int(np.argmin(np.abs(kept - share))), min(1, len(ladder) - 1))


def rungs(group: Group, options: Options) -> Floats:
    """A group's ladder: the channels that its cells may keep under a budget, (R, cells), from all to the fewest.

    max_ratio limits the fewest, and round_to the numbers in between. A group matched by `keep` has one rung.
    """
    asked = _asked(group, options)
    if asked is not None:
        return np.array([asked], dtype=np.float64)
    sizes = torch.bincount(group.cells)
    least = (1 - options.max_ratio) * group.channels - 1e-9
    if bool((sizes == sizes[0]).all()):
        size, cells = int(sizes[0]), len(sizes)
        step = step_of(group, options) // math.gcd(step_of(group, options), cells)
        multiples = range((size - 1) // step * step, 0, -step * max(1, size // (RUNGS * step)))
        found = [(size,) * cells, *((k,) * cells for k in multiples if k * cells >= least)]
    else:
        shares = np.linspace(1, 1 - options.max_ratio, TRIED)[1:]
        tried = {
            sum(c): c for share in shares if (c := spread(group, float(share), step_of(group, options))) is not None
        }
        fewer = sorted((total for total in tried if least <= total < group.channels), reverse=True)
        found = [all_of(group), *(tried[total] for total in fewer)]
    return np.array(found, dtype=np.float64)
