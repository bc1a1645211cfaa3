"""Decompositions by the moments of the channels that a consumer reads: x ~ up @ x_kept + shift.

With mean m and covariance C of a group's n channels, and K the kept ones:

    least_squares   up = C[:,K] (C[K,K] + ridge)^-1, shift = m - up m_K
    nearest         each dropped channel by the one kept channel j that determines it best: up_ij = C_ij / C_jj
    least_loss      for each channel, what loses least of these, of a decomposition by weights alone, and of a constant
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.methods.generalisation import elsewhere
from fxmerge.methods.linalg import solve_ridge

LADDER = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ridges that are tried, as shares of the mean variance
EXACT = 1e-9  # the share of a channel's power below which its loss is rounding


def least_squares(mean: Tensor, covariance: Tensor, kept: Tensor, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """up (n, k) = C[:,K] C[K,K]^-1 and shift (n,) = mean - up mean_K, for the mean (n,) and covariance C (n, n)."""
    up = solve_ridge(covariance[kept][:, kept], covariance[kept], ridge).T.contiguous()
    up[kept] = torch.eye(len(kept), dtype=up.dtype)
    return up, mean - up @ mean[kept]


def cellwise_least_squares(
    mean: Tensor, covariance: Tensor, kept: Tensor, cells: Tensor, rows: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """`least_squares` within each cell: a channel is expressed by the kept channels of its own cell only.

    Returns (up, shift, factor), where factor (n,) is that of the expected error on other rows than the `rows`
    independent ones that the moments come from. With finitely many, the ridge with the least expected error is taken.
    """
    up, shift = torch.zeros(len(mean), len(kept), dtype=mean.dtype), torch.zeros_like(mean)
    factor = torch.ones_like(mean)
    for cell in torch.unique(cells).tolist():
        inside, columns = (cells == cell).nonzero().flatten(), (cells[kept] == cell).nonzero().flatten()
        local = torch.searchsorted(inside, kept[columns])
        own = _Cell(mean[inside], covariance[inside][:, inside], local)
        solved, moved, factor[inside] = own.best(rows)
        up[inside[:, None], columns[None, :]], shift[inside] = solved, moved
    return up, shift, factor


@dataclass(frozen=True)
class _Cell:
    mean: Tensor
    covariance: Tensor
    kept: Tensor

    def best(self, rows: float) -> tuple[Tensor, Tensor, float]:
        """(up, shift, factor) with the ridge of LADDER that has the least expected error of standardised channels."""
        if not math.isfinite(rows):
            return *least_squares(self.mean, self.covariance, self.kept), 1.0
        values = torch.linalg.eigvalsh(self.covariance[self.kept][:, self.kept]).clamp(min=0)
        variance = self.covariance.diagonal()
        solid = variance > variance.max().clamp(min=0) * 1e-12
        found = []
        for ridge in LADDER:
            up, shift = least_squares(self.mean, self.covariance, self.kept, ridge)
            shift_by = ridge * float(values.mean()) + torch.finfo(torch.float64).tiny
            factor = elsewhere(float((values / (values + shift_by)).sum()), rows)
            rest = residual(up, shift, self.mean, self.covariance, self.kept)
            found.append((factor * float((rest / variance)[solid].sum()), up, shift, factor))
        return min(found, key=lambda one: one[0])[1:]


def nearest(mean: Tensor, covariance: Tensor, kept: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Each dropped channel as a multiple of the one kept channel that determines it best, and a constant: (up, shift).

    The scale of channel j is C_ij / C_jj, the cosine times the ratio of the deviations; it removes C_ij^2 / C_jj from
    the variance of channel i.
    """
    across, power = covariance[:, kept], covariance.diagonal()[kept]
    solid = power > power.max().clamp(min=0) * 1e-12
    scale = torch.where(solid, across / torch.where(solid, power, 1), 0)
    removed = (scale * across).masked_fill(cells[:, None] != cells[kept][None, :], -1)
    best = removed.argmax(1, keepdim=True)
    up = torch.zeros_like(scale).scatter_(1, best, scale.gather(1, best))
    up = torch.where(removed.gather(1, best) > 0, up, 0)
    up[kept] = torch.eye(len(kept), dtype=up.dtype)
    return up, mean - up @ mean[kept]


def residual(up: Tensor, shift: Tensor, mean: Tensor, covariance: Tensor, kept: Tensor) -> Tensor:
    """E (x_i - up_i x_K - shift_i)^2 of each channel, (n,)."""
    spread = covariance.diagonal() - 2 * (up * covariance[:, kept]).sum(1)
    spread = spread + ((up @ covariance[kept][:, kept]) * up).sum(1)
    return spread.clamp(min=0) + (mean - up @ mean[kept] - shift).square()


def least_loss(
    exact: tuple[Tensor, Tensor], mean: Tensor, covariance: Tensor, kept: Tensor, cells: Tensor,
    rows: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(up, shift) with, for each channel, the decomposition that loses least by these moments, and its loss (n,).

    The candidates are `exact`, a multiple of one kept channel and a constant (`nearest`), least squares by all kept
    channels of the cell and a constant, and a constant alone. `exact` is (up, shift) by weights alone: moments that
    are estimated do not make a channel better that it represents exactly. rows: the independent rows behind them.
    """
    alone = torch.zeros_like(exact[0])
    alone[kept] = torch.eye(len(kept), dtype=alone.dtype)
    up, shift, factor = cellwise_least_squares(mean, covariance, kept, cells, rows)
    found = [
        exact,
        (up, shift),
        nearest(mean, covariance, kept, cells),
        (alone, torch.where(alone.any(1), 0, mean)),
    ]
    losses = torch.stack([residual(up, shift, mean, covariance, kept) for up, shift in found])
    losses[1] *= factor
    losses[2] *= elsewhere(1, rows)
    losses[0] = torch.where(losses[0] <= EXACT * (covariance.diagonal() + mean.square()), -1, losses[0])
    best = losses.argmin(0)
    ups, shifts = (torch.stack(parts) for parts in zip(*found, strict=True))
    at = torch.arange(len(mean))
    return ups[best, at], shifts[best, at], losses[best, at].clamp(min=0)
