"""What a fit loses on other rows, against rows that were drawn anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxmerge.methods import generalisation
from fxmerge.methods.elimination import curve
from fxmerge.methods.evidence import Reading
from fxmerge.methods.generalisation import elsewhere, independent_rows, pieces, shrunk
from fxmerge.methods.least_squares import second_moments


def counted(rows: list[Tensor]) -> float:
    return independent_rows(rows, *second_moments(rows, lambda value: value), lambda value: value)


@pytest.mark.parametrize("copies", [1, 16])
@pytest.mark.parametrize("batch", [20, 96])
def test_positions_of_one_image_are_not_independent(copies: int, batch: int) -> None:
    """Every row stands there several times, as the positions of an image without any texture."""
    torch.manual_seed(0)
    x = torch.randn(96, 1, 60) @ torch.randn(60, 60) + 2
    rows = [part.repeat_interleave(copies, 0) for part in x.split(batch)]
    assert counted(rows) == pytest.approx(96, rel=0.25)


def test_a_sample_of_the_columns_counts_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 2, 60) @ torch.randn(60, 60)
    rows = [part.repeat_interleave(4, 0) for part in x.split(32)]
    whole = counted(rows)
    monkeypatch.setattr(generalisation, "COLUMNS", 24)
    assert whole != counted(rows) == pytest.approx(whole, rel=0.15)


def test_one_enormous_row_counts_for_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(800, 1, 20)
    many = counted([x.clone()])
    x[5] *= 1000
    assert counted([x]) < 3 < 400 < many


def test_a_dead_channel_and_a_single_row_count() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 2, 12)
    x[:, 0, 3] = 0
    assert 200 < counted([x]) <= 400
    assert counted([x[:1]]) == 1 and counted([torch.zeros(50, 1, 4)]) == 50


@pytest.mark.parametrize("sizes", [[64], [7, 1, 30, 26], [3], [1, 0, 1]])
def test_pieces_are_the_rows_in_order_whatever_the_batches(sizes: list[int]) -> None:
    rows = torch.arange(sum(sizes))[:, None]
    found = pieces(list(rows.split(sizes)))
    assert torch.equal(torch.cat([part for piece in found for part in piece]), rows)
    assert [sum(map(len, p)) for p in found] == [sum(map(len, p)) for p in pieces([rows])]


@pytest.mark.parametrize("rows", [60, 150, 400])
def test_the_factor_is_that_of_rows_never_seen(rows: int) -> None:
    torch.manual_seed(0)
    p, truth = 40, torch.randn(40, 5, dtype=torch.float64)
    mix = torch.randn(p, p, dtype=torch.float64)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, p, dtype=torch.float64) @ mix
        return x, x @ truth + 10 * torch.randn(count, 5, dtype=torch.float64)

    (x, y), (other, target) = drawn(rows), drawn(5000)
    gram, ridge = x.T @ x / rows, 1.0
    lifted = gram + ridge * torch.eye(p, dtype=torch.float64)
    solved = torch.linalg.solve(lifted, x.T @ y / rows)
    freedom = float(torch.linalg.solve(lifted, gram).trace())
    ratio = float((other @ solved - target).square().mean() / (x @ solved - y).square().mean())
    assert elsewhere(freedom, rows) == pytest.approx(ratio, rel=0.35)
    assert ratio > 1.15 and elsewhere(freedom, 1e9) == pytest.approx(1, rel=1e-6)


def test_few_rows_do_not_make_channels_redundant() -> None:
    """With 40 rows of 100 independent channels, any 40 explain all the others on these rows, and nothing elsewhere."""
    torch.manual_seed(0)
    x = torch.randn(40, 100, dtype=torch.float64)
    every, weight = torch.arange(100), torch.randn(10, 100, dtype=torch.float64)
    gram = torch.cov(x.T, correction=0)
    believed, expected = (
        float(curve([Reading(gram, weight, every, every[:, None], independent=n)], every, 40)[60]) for n in (1e9, 40.0)
    )
    assert believed < 0.1
    assert expected > 0.4  # 40 of 100 independent channels of equal weight are gone


@pytest.mark.parametrize("rows", [30, 100, 1000])
def test_shrunk_correlations_are_closer_to_the_true_ones(rows: int) -> None:
    """Of 40 channels with known correlations; the fewer rows, the more."""
    g = torch.Generator().manual_seed(0)
    p = 40
    mix = torch.eye(p, dtype=torch.float64) + 0.15 * torch.randn(p, p, generator=g, dtype=torch.float64)
    truth = mix @ mix.T
    off = [0.0, 0.0]
    for _ in range(20):
        x = torch.randn(rows, p, generator=g, dtype=torch.float64) @ mix.T
        seen = x.T.cov(correction=0)
        for number, found in enumerate((seen, shrunk(seen, rows))):
            assert torch.equal(found.diagonal(), seen.diagonal())
            off[number] += float((found - truth).fill_diagonal_(0).square().sum())
    assert off[1] < (0.75 if rows == 30 else 0.95 if rows == 100 else 1.0) * off[0]


def test_what_many_rows_say_is_not_shrunk() -> None:
    seen = torch.tensor([[1.0, 0.6, 0.0], [0.6, 4.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(shrunk(seen, float("inf")), seen)
    assert torch.equal(shrunk(seen, 1.0), seen.diagonal().diag())  # of one row, correlations mean nothing
