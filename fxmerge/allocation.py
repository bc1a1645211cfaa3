"""Allocation: how many channels each group keeps. ALLOCATORS maps a name to a function of groups and options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from .errors import FxMergeError
from .ir import Group
from .options import Options


def rounded(keep: float, size: int, cells: int, round_to: int) -> int:
    """Channels that one of a group's equal cells keeps: at least 1, and such that the group's width is a multiple.

    Where the cell is too small for a multiple it stays as it is.
    """
    step = round_to // math.gcd(round_to, cells)
    if step == 1:
        return min(size, max(1, round(keep)))
    multiple = min(math.floor(keep / step + 0.5), size // step)
    return multiple * step if multiple else min(size, step)


def spread(group: Group, share: float, round_to: int, total: int | None = None) -> tuple[int, ...] | None:
    """Channels that each cell of a group keeps, so that the rows of each block keep equally many.

    share: of each cell, as nearly as the blocks allow; total: or exactly so many in all. None: no such numbers exist.
    Equal cells keep equally many. Unequal ones (channels that were shuffled again and again) are an integer programme:
    minimise sum |k_c - share n_c| subject to the blocks' equations.
    """
    sizes = torch.bincount(group.cells)
    cells = len(sizes)
    if bool((sizes == sizes[0]).all()) and (total is None or total % cells == 0):
        size = int(sizes[0])
        return (rounded(size * share, size, cells, round_to) if total is None else total // cells,) * cells
    rows = []
    for block in group.blocks:
        first, *others = (torch.zeros(cells).index_fill_(0, torch.tensor(row), 1.0) for row in block)
        rows += [other - first for other in others]
    everything = torch.ones(cells)
    # variables: k (cells), the excess |k - target| (cells), the multiple z of round_to
    identity, nothing = np.eye(cells), np.zeros((cells, 1))
    target = sizes.numpy() * share
    constraints = [
        LinearConstraint(np.hstack([identity, -identity, nothing]), ub=target),
        LinearConstraint(np.hstack([-identity, -identity, nothing]), ub=-target),
    ]
    if rows:
        equal = np.hstack([torch.stack(rows).numpy(), np.zeros((len(rows), cells + 1))])
        constraints.append(LinearConstraint(equal, 0, 0))
    whole = np.hstack([everything.numpy(), np.zeros(cells), [0.0 if total is not None else -round_to]])
    constraints.append(LinearConstraint(whole[None], total or 0, total or 0))
    bounds = Bounds(
        np.concatenate([np.ones(cells), np.zeros(cells + 1)]),
        np.concatenate([sizes.numpy(), np.full(cells + 1, np.inf)]),
    )
    cost = np.concatenate([np.zeros(cells), np.ones(cells), [0.0]])
    integral = np.concatenate([np.ones(cells), np.zeros(cells), [1.0]])
    found = milp(cost, constraints=constraints, bounds=bounds, integrality=integral, options={"time_limit": 10})
    return tuple(int(k) for k in np.rint(found.x[:cells])) if found.x is not None else None


def shaken(group: Group, block: int) -> torch.Tensor:
    """Half of a group's channels, ascending: the first ones of each even row of a block, the last ones of odd rows.

    What a trial narrows the group to: a graph that deals blocks out like cards cannot follow such a choice.
    """
    counts = spread(group, 0.5, 1) or tuple(torch.bincount(group.cells).tolist())
    odd = {cell for row in group.blocks[block][1::2] for cell in row}
    kept = []
    for cell, count in enumerate(counts):
        inside = (group.cells == cell).nonzero().flatten()
        kept.append(inside[len(inside) - count :] if cell in odd else inside[:count])
    return torch.cat(kept).sort().values


def uniform(groups: Sequence[Group], options: Options) -> dict[str, tuple[int, ...]]:
    """Every group keeps the share 1 - ratio, or what `keep` says: {group: channels kept in each cell}."""
    kept = {}
    for group in groups:
        asked = next((v for pattern, v in options.keep.items() if fnmatchcase(group.name, pattern)), None)
        if isinstance(asked, int):
            counts = spread(group, asked / group.channels, 1, asked) if asked <= group.channels else None
            if counts is None:
                blocks = f" in {len(set(group.cells.tolist()))} cells that blocks tie together" if group.blocks else ""
                has = f"which has {group.channels}{blocks}"
                raise FxMergeError(f"keep asks for {asked} channels of {group.name}, {has}")
        else:
            share = 1 - options.ratio if asked is None else asked
            counts = spread(group, share, options.round_to) or tuple(torch.bincount(group.cells).tolist())
        kept[group.name] = counts
    return kept


ALLOCATORS: dict[str, Callable[[Sequence[Group], Options], dict[str, tuple[int, ...]]]] = {"uniform": uniform}


def check_patterns(groups: Sequence[Group], modules: Sequence[str], options: Options) -> None:
    """Raise FxMergeError for a pattern of `keep` or `ignore` that matches nothing: a typing mistake, most likely."""
    known = [g.name for g in groups]
    for pattern in options.keep:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise FxMergeError(f"keep: {pattern!r} matches no group; the groups are {_some(known)}")
    for pattern in options.ignore:
        if not any(fnmatchcase(name, pattern) for name in (*known, *modules)):
            raise FxMergeError(f"ignore: {pattern!r} matches no module and no group; the groups are {_some(known)}")


def _some(known: Sequence[str]) -> str:
    return ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "") if known else "none"


def ignored(group: Group, options: Options) -> bool:
    """Does a pattern of `ignore` name the group or a module of it, or a module around one?"""
    names = [group.name, *(m.layer.module for m in (*group.writers, *group.carriers, *group.readers))]
    around = {".".join(name.split(".")[:n]) for name in names for n in range(1, len(name.split(".")) + 1)}
    return any(fnmatchcase(name, pattern) for pattern in options.ignore for name in around)
