"""Decompositions by the moments of the channels that a consumer reads: x ~ up @ x_kept + shift.

With mean m and covariance C of a group's n channels, and K the kept ones:

    least_squares   up = C[:,K] (C[K,K] + ridge)^-1, shift = m - up m_K
    nearest         each dropped channel by the one kept channel j that determines it best: up_ij = C_ij / C_jj
    least_loss      for each channel, what loses least of these, of a decomposition by weights alone, and of a constant
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmerge.methods.linalg import others, solve_ridge

EXACT = 1e-9  # the share of a channel's power below which its loss is rounding


def least_squares(mean: Tensor, covariance: Tensor, kept: Tensor, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """up (n, k) = C[:,K] C[K,K]^-1 and shift (n,) = mean - up mean_K, for the mean (n,) and covariance C (n, n)."""
    dropped, across = others(kept, len(mean)), covariance[kept]
    up, _ = alone(mean, kept)
    up[dropped] = solve_ridge(across[:, kept], across[:, dropped], ridge).T
    return up, mean - up @ mean[kept]


def cellwise_least_squares(
    mean: Tensor, covariance: Tensor, kept: Tensor, cells: Tensor, ridge: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """`least_squares` within each cell: a channel is expressed by the kept channels of its own cell only."""
    up, shift = torch.zeros(len(mean), len(kept), dtype=mean.dtype), torch.zeros_like(mean)
    for cell in torch.unique(cells).tolist():
        inside, columns = (cells == cell).nonzero().flatten(), (cells[kept] == cell).nonzero().flatten()
        local = torch.searchsorted(inside, kept[columns])
        own, moved = least_squares(mean[inside], covariance[inside][:, inside], local, ridge)
        up[inside[:, None], columns[None, :]], shift[inside] = own, moved
    return up, shift


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
    power, across = covariance.diagonal(), covariance[:, kept]
    at = up.abs().argmax(1, keepdim=True)  # the only entry of most candidates' rows
    factor, one = up.gather(1, at)[:, 0], across.gather(1, at)[:, 0]
    spread = power + factor * (factor * power[kept[at[:, 0]]] - 2 * one)
    full = (up != 0).sum(1) > 1
    rows = up[full]
    spread[full] = power[full] + (rows * (rows @ across[kept] - 2 * across[full])).sum(1)
    return spread.clamp(min=0) + (mean - up @ mean[kept] - shift).square()


def alone(mean: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(up, shift) where a dropped channel is replaced by its mean."""
    up = torch.zeros(len(mean), len(kept), dtype=mean.dtype)
    up[kept] = torch.eye(len(kept), dtype=mean.dtype)
    return up, torch.where(up.any(1), 0, mean)


def exactly(found: tuple[Tensor, Tensor], mean: Tensor, covariance: Tensor, kept: Tensor) -> Tensor:
    """Whether (up, shift) loses nothing but rounding in each channel, (n,)."""
    return residual(*found, mean, covariance, kept) <= EXACT * (covariance.diagonal() + mean.square())


def least_loss(
    exact: tuple[Tensor, Tensor], mean: Tensor, covariance: Tensor, kept: Tensor, cells: Tensor,
    represented: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(up, shift) with, for each channel, the decomposition that loses least by these moments, and its loss (n,).

    The candidates are `exact`, which is computed from weights alone, `cellwise_least_squares`, `nearest` and `alone`.
    Estimated moments do not displace `exact` from channels that it represents exactly: those that are `represented`,
    (n,), or where it loses nothing by these moments.
    """
    found = [
        exact,
        cellwise_least_squares(mean, covariance, kept, cells),
        nearest(mean, covariance, kept, cells),
        alone(mean, kept),
    ]
    losses = torch.stack([residual(up, shift, mean, covariance, kept) for up, shift in found])
    own = exactly(exact, mean, covariance, kept) if represented is None else represented
    losses[0] = torch.where(own, -1, losses[0])
    least, best = losses.min(0)
    up, shift = exact
    for number, (other, moved) in enumerate(found[1:], 1):
        up, shift = torch.where((best == number)[:, None], other, up), torch.where(best == number, moved, shift)
    return up, shift, least.clamp(min=0)
