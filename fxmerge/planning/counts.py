"""Allocation: how many channels each group keeps, by a ratio or by a budget, as the blocks of its cells allow.

A budget is shared out on ladders (`allocators`): the numbers of channels that a group may keep at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from fxmerge.errors import FxMergeError
from fxmerge.ir.records import Group
from fxmerge.methods.allocation import ALLOCATORS, Floats, Ints, Ladder, Price, Problem
from fxmerge.options import Options

RUNGS = 256  # of a ladder with equal cells, about, at most
TRIED = 17  # shares at which unequal cells are spread
TOLERANCE = 0.01  # of what a budget allows
PAIRED, MOVES = 8, range(-3, 4)  # groups that are moved to come nearer to a budget, by so many rungs


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


def by_ratio(
    groups: Sequence[Group], options: Options, overlaps: Mapping[str, Mapping[str, float]]
) -> dict[str, tuple[int, ...]]:
    """Every group keeps the share s = 1 - ratio, or what `keep` says: {group: channels kept in each cell}.

    overlaps: {group: {group of whole blocks: share of its channels in them}}. Where blocks leave and the others lose
    width, both together leave s: sqrt(s) of the blocks, and of the channels in those what is then missing to s.
    """
    share, kept = 1 - options.ratio, dict[str, tuple[int, ...]]()
    left: dict[str, float] = {}  # share of each group that stays
    doubled = {name for g in groups for name in overlaps.get(g.name, ())}
    for group in sorted(groups, key=lambda g: g.name not in doubled):  # blocks first: the others follow them
        gone = sum(part * (1 - left.get(name, 1)) for name, part in overlaps.get(group.name, {}).items())
        own = math.sqrt(share) if group.name in doubled else min(1.0, share / (1 - gone))
        asked = _asked(group, options)
        kept[group.name] = spread(group, own, options.round_to) or all_of(group) if asked is None else asked
        left[group.name] = sum(kept[group.name]) / group.channels
    return kept


def all_of(group: Group) -> tuple[int, ...]:
    return tuple(torch.bincount(group.cells).tolist())


def _asked(group: Group, options: Options) -> tuple[int, ...] | None:
    """What `keep` says of a group, None where it says nothing."""
    asked = next((v for pattern, v in options.keep.items() if fnmatchcase(group.name, pattern)), None)
    if not isinstance(asked, int):
        return None if asked is None else spread(group, asked, options.round_to) or all_of(group)
    counts = spread(group, asked / group.channels, 1, asked) if asked <= group.channels else None
    if counts is None:
        blocks = f" in {len(set(group.cells.tolist()))} cells that blocks tie together" if group.blocks else ""
        has = f"which has {group.channels}{blocks}"
        raise FxMergeError(f"keep asks for {asked} channels of {group.name}, {has}")
    return counts


def rungs(group: Group, options: Options) -> Floats:
    """What a group may keep under a budget, (R, cells), the most first: all, and what max_ratio and round_to leave."""
    asked = _asked(group, options)
    if asked is not None:
        return np.array([asked], dtype=np.float64)
    sizes = torch.bincount(group.cells)
    least = (1 - options.max_ratio) * group.channels - 1e-9
    if bool((sizes == sizes[0]).all()):
        size, cells = int(sizes[0]), len(sizes)
        step = options.round_to // math.gcd(options.round_to, cells)
        multiples = range((size - 1) // step * step, 0, -step * max(1, size // (RUNGS * step)))
        found = [(size,) * cells, *((k,) * cells for k in multiples if k * cells >= least)]
    else:
        shares = np.linspace(1, 1 - options.max_ratio, TRIED)[1:]
        tried = {sum(c): c for share in shares if (c := spread(group, float(share), options.round_to)) is not None}
        fewer = sorted((total for total in tried if least <= total < group.channels), reverse=True)
        found = [all_of(group), *(tried[total] for total in fewer)]
    return np.array(found, dtype=np.float64)


def by_budget(
    groups: Sequence[Group],
    options: Options,
    ladders: Mapping[str, Floats],
    errors: Mapping[str, Floats],
    price: Price,
    share: float,
    what: str,
) -> dict[str, tuple[int, ...]]:
    """{group: channels kept in each cell} at a price of `share` of the original's, or less where rungs allow no nearer.

    Raises FxMergeError where the lowest rungs cost more.
    """
    steps = tuple(Ladder(ladders[g.name], errors[g.name]) for g in groups)
    problem = Problem(steps, price, share * price.original)
    full = np.zeros(len(steps), dtype=np.int64)
    if problem.cost(problem.bottom) > problem.target * (1 + TOLERANCE):
        least, free = problem.cost(problem.bottom) / price.original, int((problem.bottom > 0).sum())
        where = f"where the {free} groups in scope that may narrow give up what they may" if free else "at the least"
        told = f"the budget asks for {share:.1%} of the {what}, but {least:.1%} are left {where}"
        raise FxMergeError(
            f"{told}; {remedies(options)}" if free else f"{told}: no group may narrow; {remedies(options, False)}"
        )
    chosen = full if problem.cost(full) <= problem.target or share >= 1 else ALLOCATORS[options.allocation](problem)
    chosen = _nearer(problem, chosen)
    return {g.name: tuple(int(k) for k in ladders[g.name][rung]) for g, rung in zip(groups, chosen, strict=True)}


def _nearer(problem: Problem, chosen: Ints) -> Ints:
    """Where a budget is met by far: some rungs up or down in two of the groups whose rungs cost least."""
    cost, bottom = problem.cost(chosen), problem.bottom
    if cost >= problem.target * (1 - TOLERANCE):
        return chosen
    one = np.eye(len(chosen), dtype=np.int64)
    steps = [abs(problem.cost(chosen + (one[g] if chosen[g] < bottom[g] else -one[g])) - cost) for g in range(len(one))]
    fine = [g for g in np.argsort(steps, kind="stable").tolist() if bottom[g] > 0][:PAIRED]
    moves = [a * one[g] + b * one[h] for g in fine for h in fine for a in MOVES for b in MOVES if g <= h]
    tried = [m for move in moves if ((m := chosen + move) >= 0).all() and (m <= bottom).all()]
    able = [rungs for rungs in tried if problem.cost(rungs) <= problem.target * (1 + TOLERANCE)]
    return min([chosen, *able], key=lambda rungs: abs(problem.cost(rungs) - problem.target))


def remedies(options: Options, narrow: bool = True) -> str:
    """What makes a budget easier to meet, of what these options hold it back by; `narrow`: may any group narrow?"""
    found = ["ask for a larger share"]
    if narrow:
        found.append(f"raise max_ratio (now {options.max_ratio:g})")
    if options.scope == "internal":
        found.append('widen scope to "all"')
    if options.keep or options.ignore:
        found.append("let go of groups that keep and ignore hold")
    if options.round_to > 1:
        found.append(f"lower round_to (now {options.round_to})")
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


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
