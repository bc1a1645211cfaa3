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

from .linalg import solve_ridge

Reduce = Callable[[Tensor], Tensor]  # a sum over all processes
CHUNK = 8192  # rows at a time in float64


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
        mean = reduce(torch.stack([t.sum(0, dtype=torch.float64) for t in targets]).sum(0)) / self.count
        cross = reduce(_product(rows, targets)) / self.count - self.mean_p[:, :, None] * mean[:, None, :]
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
    count = float(reduce(torch.tensor(float(sum(map(len, rows))), dtype=torch.float64, device=rows[0].device)))
    sums = (torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0) for parts in (rows, targets))
    mean_p, mean_t = (reduce(s) / count * centred for s in sums)
    gram = reduce(_product(rows, rows)) / count - mean_p[:, :, None] * mean_p[:, None, :]
    cross = reduce(_product(rows, targets)) / count - mean_p[:, :, None] * mean_t[:, None, :]
    return System(count, mean_p, mean_t, gram, cross)


def second_moments(rows: list[Tensor], reduce: Reduce) -> Tensor:
    """Of patches (rows, g, p) about their mean: (g, p, p), float64."""
    count = reduce(torch.tensor(float(sum(map(len, rows))), dtype=torch.float64, device=rows[0].device))
    mean = reduce(torch.stack([part.sum(0, dtype=torch.float64) for part in rows]).sum(0)) / count
    return reduce(_product(rows, rows)) / count - mean[:, :, None] * mean[:, None, :]


def _product(rows: list[Tensor], others: list[Tensor]) -> Tensor:
    """sum over rows of row' other, (g, p, o), in float64 by chunks."""
    total: Tensor | None = None
    for row, other in zip(rows, others, strict=True):
        for a, b in zip(torch.split(row, CHUNK), torch.split(other, CHUNK), strict=True):
            one = a.double().transpose(0, 1)
            part = one.mT @ (one if other is row else b.double().transpose(0, 1))
            total = part if total is None else total.add_(part)
    assert total is not None
    return total
