"""Systems: the least squares that refit solves for a layer, from sums over rows.

Patches P (rows, p) and targets T (rows, o), for each of g blocks; the weights that are there W0 (o, p). With deviations
from the means, G = P'P / rows and R = P'T / rows:

    W' = argmin |P W' - T|^2 / rows + mu d |W' - W0|^2,     d = mean(diag G)
       = W0 + (G + mu d I)^-1 (R - G W0),                   b' = mean T - W' mean P

A layer that can have no bias (`centred=False`) is solved about zero instead of the means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxmerge.methods.linalg import solve_ridge

Reduce = Callable[[Tensor], Tensor]  # a sum over all processes
CHUNK = 2048  # rows at a time whose products are summed in the rows' own precision, float32 at least


@dataclass(frozen=True)
class System:
    """Moments of patches and targets about their means, float64."""

    count: float
    mean_p: Tensor  # (g, p)
    mean_t: Tensor  # (g, o)
    gram: Tensor  # (g, p, p)
    cross: Tensor  # (g, p, o)

    def with_targets(self, rows: list[Tensor], targets: list[Tensor], reduce: Reduce) -> System:
        """The same patches with other targets: (rows, g, p) and (rows, g, o) by batch."""
        mean = _mean(targets, self.count, reduce)
        cross = reduce(_product(rows, self.mean_p, targets, mean)) / self.count
        return replace(self, mean_t=mean, cross=cross)

    def solve(self, start: Tensor, ridge: float) -> Tensor:
        """W' (g, o, p) for W0 `start`."""
        right = self.cross - self.gram @ start.mT
        change = [solve_ridge(g, r, ridge) for g, r in zip(self.gram, right, strict=True)]
        return start + torch.stack(change).mT

    def intercept(self, weight: Tensor, mean: Tensor) -> Tensor:
        """The bias (g, o) that gives a weight's outputs these means."""
        return mean - torch.einsum("gop,gp->go", weight, self.mean_p)

    def variance(self, weight: Tensor) -> Tensor:
        """The variance of a weight's outputs: (g, o)."""
        return torch.einsum("gop,gpo->go", weight, self.gram @ weight.mT).clamp(min=0)


def system(rows: list[Tensor], targets: list[Tensor], reduce: Reduce, centred: bool = True) -> System:
    """The system of these rows: patches (rows, g, p) and targets (rows, g, o) by batch."""
    count = _count(rows, reduce)
    mean_p, mean_t = _mean(rows, count, reduce) * centred, _mean(targets, count, reduce) * centred
    gram = reduce(_product(rows, mean_p, rows, mean_p)) / count
    cross = reduce(_product(rows, mean_p, targets, mean_t)) / count
    return System(count, mean_p, mean_t, gram, cross)


def second_moments(rows: list[Tensor], reduce: Reduce) -> tuple[Tensor, Tensor]:
    """The mean of patches (rows, g, p) and their second moments about it: (g, p), (g, p, p), float64."""
    count = _count(rows, reduce)
    mean = _mean(rows, count, reduce)
    return mean, reduce(_product(rows, mean, rows, mean)) / count


def _count(rows: list[Tensor], reduce: Reduce) -> float:
    return float(reduce(torch.tensor(float(sum(map(len, rows))), dtype=torch.float64, device=rows[0].device)))


def _mean(parts: list[Tensor], count: float, reduce: Reduce) -> Tensor:
    return reduce(torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0)) / count


def _product(rows: list[Tensor], mean: Tensor, others: list[Tensor], other_mean: Tensor) -> Tensor:
    """sum over rows of (row - mean)' (other - its mean): (g, p, o), float64.

    Rows are multiplied in their own precision, some at a time, and these products are summed in float64: about their
    means nothing cancels, and what is rounded is far below the ridge.
    """
    total: Tensor | None = None
    for row, other in zip(rows, others, strict=True):
        for a, b in zip(torch.split(row, CHUNK), torch.split(other, CHUNK), strict=True):
            precise = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
            one = (a.to(precise) - mean.to(precise)).transpose(0, 1)
            two = one if other is row else (b.to(precise) - other_mean.to(precise)).transpose(0, 1)
            part = (one.mT @ two).double()
            total = part if total is None else total.add_(part)
    assert total is not None
    return total
