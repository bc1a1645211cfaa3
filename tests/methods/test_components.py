"""Components of given moments: against the truncated SVD, against regressions on channels, and at full rank."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fxmerge.methods.by_moments import cellwise_least_squares, residual
from fxmerge.methods.components import Components, blended, components, missed, rotation


def moments(n: int, rank: int, seed: int = 0) -> Tensor:
    root = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def of_one(covariance: Tensor, mass: Tensor, rows: float = float("inf")) -> Components:
    return components(covariance[None], mass[None], torch.zeros(len(covariance), dtype=torch.int64), rows)


def lost(covariance: Tensor, weight: Tensor, turn: Tensor, k: int) -> float:
    """E |W (x - up down x)|^2 where `up` is the regression of the rotated channels on the first k."""
    turned, kept = turn @ covariance @ turn.T, torch.arange(k)
    zeros = torch.zeros(len(turned), dtype=torch.float64)
    up, _ = cellwise_least_squares(zeros, turned, kept, torch.zeros(len(turned), dtype=torch.int64), 1e-12)
    off = torch.eye(len(turn), dtype=torch.float64) - turn.T @ up @ turn[:k]
    return float((weight @ off @ covariance @ off.T @ weight.T).trace())


@pytest.mark.parametrize(("rank", "out"), [(8, 12), (8, 3), (5, 12), (4, 6)])
def test_the_loss_at_each_rank_is_that_of_the_truncated_svd(rank: int, out: int) -> None:
    covariance = moments(8, rank)
    weight = torch.randn(out, 8, dtype=torch.float64)
    values, vectors = np.linalg.eigh(covariance.numpy())
    root = vectors * np.sqrt(values.clip(0))  # C = root root'
    singular = np.linalg.svd(weight.numpy() @ root, compute_uv=False)
    singular = np.concatenate([singular, np.zeros(8 - len(singular))])
    turn, powers = rotation(covariance, weight.T @ weight)
    torch.testing.assert_close(turn @ turn.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    np.testing.assert_allclose(powers.numpy(), singular**2, rtol=1e-8, atol=1e-8 * singular[0] ** 2)
    for k in range(1, 9):
        expected = float((singular[k:] ** 2).sum())
        assert abs(lost(covariance, weight, turn, k) - expected) < 1e-7 * float((singular**2).sum())


def test_no_channels_with_a_regression_lose_less() -> None:
    """All subsets of k of 6 channels, with the best regression on each."""
    covariance, weight = moments(6, 6), torch.randn(7, 6, dtype=torch.float64)
    mass = weight.T @ weight
    found = of_one(covariance, mass)
    for k in range(1, 6):
        best = min(
            float((mass * missed(covariance, torch.tensor(kept))).sum()) for kept in itertools.combinations(range(6), k)
        )
        least = float(found.curve(0)[k])
        assert least < best
        assert found.lose_less(torch.arange(k))


@pytest.mark.parametrize("which", ["covariance", "mass"])
def test_at_the_rank_the_others_are_dropped_exactly(which: str) -> None:
    """Without any regression: the components that are left are nothing, or nothing reads them."""
    low, full = moments(8, 3, 1), moments(8, 8, 2)
    covariance, mass = (low, full) if which == "covariance" else (full, low)
    turn, powers = rotation(covariance, mass)
    left = turn[3:]
    off = left @ covariance @ left.T if which == "covariance" else left @ mass @ left.T
    assert float(off.abs().max()) < 1e-10 * float(full.abs().max())
    assert float(powers[3:].sum()) < 1e-10 * float(powers.sum())


def test_channels_that_lose_nothing_are_kept() -> None:
    root = torch.randn(3, 5, dtype=torch.float64)
    root = torch.cat([root, 2 * root[:1], -3 * root[1:2]])
    found = of_one(root @ root.T, moments(5, 5))
    assert not found.lose_less(torch.tensor([0, 1, 2]))
    assert found.lose_less(torch.tensor([0, 1]))


def test_few_rows_speak_for_channels() -> None:
    """A rotation is fitted with more parameters than a regression on given channels."""
    covariance, mass, kept = moments(12, 12), moments(12, 12, 3), torch.arange(6)
    assert of_one(covariance, mass, 1e6).lose_less(kept)
    assert not of_one(covariance, mass, 8.0).lose_less(kept)


def test_cells_and_strands_keep_equally_many() -> None:
    cells = torch.tensor([0, 1, 0, 1, 0, 1])
    covariance, mass = (torch.stack([moments(6, 6, s), moments(6, 6, s + 1)]) for s in (0, 5))
    found = components(covariance, mass, cells, float("inf"))
    turn = found.rotation
    assert turn.shape == (2, 6, 6)
    assert not turn[:, cells[:, None] != cells[None, :]].any()
    assert found.first((2, 1)).tolist() == [0, 1, 2]
    assert abs(found.share((3, 3)) - 1) < 1e-12
    lost = sum(float(found.curve(cell)[2]) for cell in (0, 1))
    whole = sum(float(found.curve(cell)[0]) for cell in (0, 1))
    assert abs(found.share((2, 2)) - (1 - lost / whole)) < 1e-12


def test_nothing_at_all() -> None:
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    for covariance, mass in ((zeros, zeros), (moments(4, 4), zeros), (zeros, moments(4, 4))):
        found = of_one(covariance, mass)
        torch.testing.assert_close(found.rotation[0] @ found.rotation[0].T, torch.eye(4, dtype=torch.float64))
        assert found.share((2,)) == 1.0 and not found.lose_less(torch.arange(2))


def test_blending_keeps_the_trace() -> None:
    one, other = moments(5, 5), moments(5, 2, 7)
    half = blended(one, other, 0.5)
    assert abs(float(half.trace() - one.trace())) < 1e-9
    assert torch.equal(blended(one, other, 0.0), one)
    few = blended(one, other, 1.0)
    assert torch.linalg.matrix_rank(few) == 2


def test_residuals_are_what_a_regression_leaves() -> None:
    covariance, kept = moments(6, 6), torch.tensor([1, 4])
    mean = torch.zeros(6, dtype=torch.float64)
    up, shift = cellwise_least_squares(mean, covariance, kept, torch.zeros(6, dtype=torch.int64), 1e-12)
    expected = residual(up, shift, mean, covariance, kept)
    torch.testing.assert_close(missed(covariance, kept).diagonal(), expected, rtol=1e-6, atol=1e-8)
