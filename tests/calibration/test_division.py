"""Which samples drafts are fitted to and compared on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxmerge.calibration import division
from fxmerge.calibration.division import comparing, solving
from fxmerge.calibration.paired_run import Settings
from fxmerge.capture.capture_model import capture
from fxmerge.ir.capture import Capture


def captured() -> Capture:
    return capture(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.randn(3, 2))


def settings(held: bool) -> Settings:
    return Settings(rows=100, seed=0, held=held, reduce=lambda t: t)


def numbered(sizes: list[int]) -> list[list[Tensor]]:
    """Batches whose samples have their number in the first column."""
    numbers = torch.arange(float(sum(sizes)))
    return [[torch.stack([part, torch.zeros_like(part)], 1)] for part in numbers.split(sizes)]


def numbers_of(batches: list[list[Tensor]], judges: list[Tensor] | None = None) -> set[int]:
    masks = judges or [torch.ones(len(batch[0]), dtype=torch.bool) for batch in batches]
    return {int(v) for batch, mask in zip(batches, masks, strict=True) for v in batch[0][mask, 0]}


@pytest.mark.parametrize(("sizes", "held"), [([16] * 6, False), ([64] * 4, True), ([40] * 3, True), ([20, 30], True)])
def test_drafts_are_compared_on_samples_that_the_survey_leaves_out(sizes: list[int], held: bool) -> None:
    own, batches = captured(), numbered(sizes)
    fit, compared, judges = comparing(own, batches, settings(held))
    assert numbers_of(fit) == set(range(sum(sizes)))
    judging = numbers_of(compared, judges)
    assert judging and judging.isdisjoint(numbers_of(solving(own, fit, 0)))
    if judges is not None:  # whole batches, in which streams are held: of the first samples only
        assert sum(len(batch[0]) for batch in compared[:-1]) < division.TRIED


@pytest.mark.parametrize("sizes", [[8], [3, 3, 3], [4, 4, 4]])
def test_few_samples_are_divided(sizes: list[int]) -> None:
    fit, compared, judges = comparing(captured(), numbered(sizes), settings(False))
    assert judges is None
    assert numbers_of(fit).isdisjoint(numbers_of(compared))
    assert numbers_of(fit) | numbers_of(compared) == set(range(sum(sizes)))


def test_one_sample_and_none() -> None:
    fit, compared, judges = comparing(captured(), numbered([1]), settings(False))
    assert numbers_of(fit) == numbers_of(compared) == {0} and judges is None
    assert comparing(captured(), [], settings(False)) == ([], [], None)
