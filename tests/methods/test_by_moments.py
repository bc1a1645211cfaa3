"""Decompositions by moments: against samples, and against loops over channels and partners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxmerge.methods.by_moments import alone, cellwise_least_squares, least_loss, nearest, residual


def samples(seed: int, n: int = 10, count: int = 400) -> Tensor:
    """Rectified mixtures, with means that are not zero and one channel that is dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator, dtype=torch.float64)
    x = (x @ torch.randn(n, n, generator=generator, dtype=torch.float64) + 0.5).relu()
    x[:, 3] = 0
    return x


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T, correction=0)


def lost(x: Tensor, up: Tensor, shift: Tensor, kept: Tensor) -> Tensor:
    return (x - x[:, kept] @ up.T - shift).square().mean(0)


@pytest.mark.parametrize("seed", range(4))
def test_the_residual_is_that_of_the_samples(seed: int) -> None:
    x, kept = samples(seed), torch.tensor([0, 2, 5, 7])
    generator = torch.Generator().manual_seed(seed)
    up, shift = (torch.randn(10, *more, generator=generator, dtype=torch.float64) for more in ((4,), ()))
    torch.testing.assert_close(residual(up, shift, *moments_of(x), kept), lost(x, up, shift, kept))


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_is_the_best_single_channel_of_the_cell(seed: int) -> None:
    x, kept, cells = samples(seed), torch.tensor([0, 1, 4, 5]), torch.arange(10) % 2
    up, shift = nearest(*moments_of(x), kept, cells)
    found = lost(x, up, shift, kept)
    for i in range(10):
        if i in kept.tolist():
            assert found[i] < 1e-12
            continue
        fits = []
        for j in kept[cells[kept] == cells[i]].tolist():
            slope, level = np.polyfit(x[:, j].numpy(), x[:, i].numpy(), 1)
            fits.append(float((x[:, i] - slope * x[:, j] - level).square().mean()))
        assert float(found[i]) == pytest.approx(min(fits), rel=1e-6, abs=1e-12)
    assert (up[cells[:, None] != cells[kept][None, :]] == 0).all() and ((up != 0).sum(1) <= 1).all()


@pytest.mark.parametrize("seed", range(4))
def test_no_candidate_loses_less_in_any_channel(seed: int) -> None:
    x, kept, cells = samples(seed), torch.tensor([0, 1, 4, 5]), torch.arange(10) % 2
    mean, covariance = moments_of(x)
    up, shift = alone(mean, kept)
    stray = torch.where(up.any(1, keepdim=True), up, 3.0), torch.zeros_like(shift)
    up, shift, loss = least_loss(stray, mean, covariance, kept, cells)
    found = lost(x, up, shift, kept)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-9)
    others = [stray, cellwise_least_squares(mean, covariance, kept, cells), nearest(mean, covariance, kept, cells)]
    for candidate in (*others, alone(mean, kept)):
        assert (found <= lost(x, *candidate, kept) + 1e-9).all()
    assert found.sum() < 0.95 * lost(x, *alone(mean, kept), kept).sum() and (found < lost(x, *stray, kept)).any()


def test_what_is_exact_stays_to_the_bit() -> None:
    """A multiple is represented exactly by weights; least squares with a ridge would only come close."""
    x, kept, cells = samples(0), torch.tensor([0, 1, 2]), torch.zeros(10, dtype=torch.int64)
    x[:, 6] = 0.3 * x[:, 1]
    mean, covariance = moments_of(x)
    up, shift = alone(mean, kept)
    up[6, 1], shift[6], shift[8] = 0.3, 0.0, 1e6
    solved, level, _ = least_loss((up, shift), mean, covariance, kept, cells)
    assert solved[6].tolist() == [0, 0.3, 0] and level[6] == 0
    assert level[8] < 100
