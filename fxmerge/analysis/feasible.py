"""How many channels a group's blocks allow it to keep."""

from __future__ import annotations

import math

import numpy as np
import torch

from fxmerge.ir.groups import Group


def rounded(keep: float, size: int, cells: int, round_to: int) -> int:
    """Channels to keep in one of a group's equal cells, so that the group's width is a multiple of round_to.

    A cell keeps at least the fewest channels that make a multiple, or all of its channels if it has fewer.
    """
    step = round_to // math.gcd(round_to, cells)
    if step == 1:
        return min(size, max(1, round(keep)))
    multiple = min(math.floor(keep / step + 0.5), size // step)
    return multiple * step if multiple else min(size, step)


def spread(group: Group, share: float, round_to: int, total: int | None = None) -> tuple[int, ...] | None:
    """Channels to keep in each cell of a group, so that all rows of a block keep equally many; None if there are none.

    share:  of each cell, as closely as the blocks allow
    total:  or exactly this many in all cells together
    Equal cells keep equally many. For unequal cells (channels that were shuffled several times) an integer programme
    is solved: minimise sum_c |k_c - share n_c| subject to the equations of the blocks.
    """
    sizes = torch.bincount(group.cells)
    cells = len(sizes)
    if bool((sizes == sizes[0]).all()) and (total is None or total % cells == 0):
        size = int(sizes[0])
        return (rounded(size * share, size, cells, round_to) if total is None else total // cells,) * cells
    from scipy.optimize import Bounds, LinearConstraint, milp

    rows = []
    for block in group.blocks:
        first, *others = (torch.bincount(torch.tensor(row), minlength=cells).float() for row in block)
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
    """Half of a group's channels, ascending: the first ones in each even row of a block, the last ones in odd rows.

    A trial keeps these: a graph that shuffles channels between blocks cannot follow such a choice.
    """
    counts = spread(group, 0.5, 1) or tuple(torch.bincount(group.cells).tolist())
    odd = {cell for row in group.blocks[block][1::2] for cell in row}
    kept = []
    for cell, count in enumerate(counts):
        inside = (group.cells == cell).nonzero().flatten()
        kept.append(inside[len(inside) - count :] if cell in odd else inside[:count])
    return torch.cat(kept).sort().values


def all_of(group: Group) -> tuple[int, ...]:
    """The size of each cell of a group."""
    return tuple(torch.bincount(group.cells).tolist())
