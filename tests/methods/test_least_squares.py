"""Least squares from sums over rows: against sums in float64, and against systems of fewer rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxmerge.methods import least_squares
from fxmerge.methods.least_squares import second_moments, system, without_each


def alone(value: Tensor) -> Tensor:
    return value


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows in two batches, with means that are not zero."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return [part.to(dtype) for part in (rows + 3).split([shape[0] // 3, shape[0] - shape[0] // 3])]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_systems_without_a_fold_are_those_of_the_other_rows(groups: int, centred: bool) -> None:
    rows, targets = drawn(90, groups, 7), drawn(90, groups, 4)
    folds = [torch.randint(-1, 5, (len(part),), generator=torch.Generator().manual_seed(1)) for part in rows]
    folds[0][:] = folds[0].clamp(max=3)  # no row of the first batch is in fold 4
    rows, targets, folds = ([x[own >= 0] for x, own in zip(of, folds, strict=True)] for of in (rows, targets, folds))
    found = without_each(rows, targets, folds, 5, alone, centred)
    for fold, one in enumerate(found):
        others = ([x[own != fold] for x, own in zip(of, folds, strict=True)] for of in (rows, targets))
        expected = system(*others, alone, centred)
        assert one.count == expected.count
        for name in ("mean_p", "mean_t", "gram", "cross"):
            torch.testing.assert_close(getattr(one, name), getattr(expected, name))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [12, 40])  # of 30 rows: with more columns than rows, and with fewer
@pytest.mark.parametrize("ridge", [1e-4, 0.03, 10.0])
def test_solutions_minimise_the_errors_and_the_change(width: int, ridge: float, centred: bool) -> None:
    """Against least squares with a row for each weight's change, by QR. Also for new targets, and one fold less."""
    rows, targets, others = drawn(30, 2, width), drawn(30, 2, 3), drawn(30, 2, 3)
    others = [one - other for one, other in zip(others, targets, strict=True)]
    folds = [torch.arange(len(part)) % 5 for part in rows]
    start = torch.randn(2, 3, width, dtype=torch.float64)

    def expected(rows: list[Tensor], targets: list[Tensor]) -> Tensor:
        p, t = (torch.cat(x) - torch.cat(x).mean(0) * centred for x in (rows, targets))
        found = []
        for g in range(2):
            pull = (ridge * p[:, g].square().sum() / width) ** 0.5  # mu d, times the number of rows
            left = torch.cat([p[:, g], pull * torch.eye(width, dtype=torch.float64)])
            right = torch.cat([t[:, g], pull * start[g].T])
            found.append(torch.linalg.lstsq(left, right, driver="gels").solution.T)
        return torch.stack(found)

    normal = system(rows, targets, alone, centred)
    factors = normal.lifted(ridge)
    wanted = expected(rows, targets)
    torch.testing.assert_close(normal.solve(start, factors), wanted)
    torch.testing.assert_close(normal.solve(start, factors, normal.gap(start)), wanted)
    moved = normal.with_targets(rows, others, alone)
    torch.testing.assert_close(moved.solve(start, factors), expected(rows, others))
    predicted = torch.einsum("ngp,gop->ngo", torch.cat(rows) - normal.mean_p, wanted)
    torch.testing.assert_close(normal.variance(wanted), predicted.square().mean(0))
    mean = torch.einsum("ngp,gop->ngo", torch.cat(rows), wanted).mean(0) * centred
    torch.testing.assert_close(normal.intercept(wanted, normal.mean_t), torch.cat(targets).mean(0) * centred - mean)
    for fold, one in enumerate(without_each(rows, targets, folds, 5, alone, centred)):
        some = [[x[own != fold] for x, own in zip(of, folds, strict=True)] for of in (rows, targets)]
        torch.testing.assert_close(one.solve(start, one.lifted(ridge)), expected(*some))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 24])
def test_second_moments_in_blocks(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks that divide neither the columns nor the rows."""
    monkeypatch.setattr(least_squares, "BLOCK", 9)
    monkeypatch.setattr(least_squares, "CHUNK", 17)
    rows = drawn(100, 2, width, dtype=dtype)
    mean, found = second_moments(rows, alone)
    whole = torch.cat(rows).double().transpose(0, 1)
    torch.testing.assert_close(mean, whole.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, torch.stack([x.T.cov(correction=0) for x in whole]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, found.mT, rtol=1e-6, atol=1e-7)


def test_sums_that_overflow_in_float32() -> None:
    rows = [torch.full((40, 1, 3), 2e38) * torch.tensor([1.0, -1.0, 0.5])]
    mean, _ = second_moments(rows, alone)
    torch.testing.assert_close(mean[0], torch.tensor([2e38, -2e38, 1e38], dtype=torch.float64), rtol=1e-6, atol=0)
