"""The least-squares problem that refit solves for a layer, from sums over rows.

For each of g blocks there are patches P (rows, p), targets T (rows, o) and the current weights W0 (o, p). With P and T
centred about their means, G = P'P / rows and R = P'T / rows:

    W' = argmin |P W' - T|^2 / rows + mu d |W' - W0|^2,     d = mean(diag G)
       = W0 + (G + mu d I)^-1 (R - G W0),                   b' = mean T - W' mean P

A layer that cannot have a bias (`centred=False`) is solved about zero instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxmerge.methods.linalg import Lifted, lifted

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes
CHUNK = 2048  # rows whose products are summed in the rows' own precision, but at least float32


@dataclass(frozen=True)
class System:
    """Moments of patches and targets about their means, float64."""

    count: float
    mean_p: Tensor  # (g, p)
    mean_t: Tensor  # (g, o)
    gram: Tensor  # (g, p, p)
    cross: Tensor  # (g, p, o)

    def with_targets(self, rows: list[Tensor], targets: list[Tensor], reduce: Reduce) -> System:
        """The system of the same patches (rows, g, p) with other targets (rows, g, o), by batch."""
        mean = _mean(targets, self.count, reduce)
        cross = reduce(_product(rows, self.mean_p, targets, mean)) / self.count
        return replace(self, mean_t=mean, cross=cross)

    def lifted(self, ridge: float) -> Lifted:
        """G + mu d I of each block, factored: it serves all systems of the same patches."""
        return lifted(self.gram, ridge)

    def gap(self, start: Tensor) -> Tensor:
        """R - G W0 (g, p, o) for W0 `start`, (g, o, p)."""
        return self.cross - self.gram @ start.mT

    def solve(self, start: Tensor, factors: Lifted, gap: Tensor | None = None) -> Tensor:
        """W' (g, o, p) for W0 `start`; its `gap`, if it is known."""
        return start + factors.solve(self.gap(start) if gap is None else gap).mT

    def intercept(self, weight: Tensor, mean: Tensor) -> Tensor:
        """The bias (g, o) with which the outputs of `weight` have the mean `mean`, (g, o)."""
        return mean - torch.einsum("gop,gp->go", weight, self.mean_p)

    def variance(self, weight: Tensor) -> Tensor:
        """The variance of the outputs of `weight`: (g, o)."""
        return torch.einsum("gop,gpo->go", weight, self.gram @ weight.mT).clamp(min=0)


def system(rows: list[Tensor], targets: list[Tensor], reduce: Reduce, centred: bool = True) -> System:
    """The system of patches (rows, g, p) and targets (rows, g, o), by batch."""
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
    """The sum over rows of (row - mean)' (other - other_mean): (g, p, o), float64.

    Rows are multiplied in their own precision, CHUNK at a time, and the products are summed in float64. As the means
    are subtracted first, nothing cancels, and rounding errors are far below the ridge. Where products overflow, they
    are computed in float64.
    """
    found = _summed_products(rows, mean, others, other_mean, torch.float32)
    if bool(found.isfinite().all()):
        return found
    return _summed_products(rows, mean, others, other_mean, torch.float64)


def _summed_products(
    rows: list[Tensor], mean: Tensor, others: list[Tensor], other_mean: Tensor, least: torch.dtype
) -> Tensor:
    total: Tensor | None = None
    for row, other in zip(rows, others, strict=True):
        for a, b in zip(torch.split(row, CHUNK), torch.split(other, CHUNK), strict=True):
            precise = torch.promote_types(torch.promote_types(a.dtype, b.dtype), least)
            one = (a.to(precise) - mean.to(precise)).transpose(0, 1)
            two = one if other is row else (b.to(precise) - other_mean.to(precise)).transpose(0, 1)
            part = (one.mT @ two).double()
            total = part if total is None else total.add_(part)
    assert total is not None
    return total
