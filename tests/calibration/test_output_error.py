"""The error of a merged graph's outputs, against the outputs of both models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmerge.analysis.propagate import provenance
from fxmerge.calibration.division import halves
from fxmerge.calibration.output_error import output_error, relative
from fxmerge.calibration.paired_run import Pair, Settings
from fxmerge.capture.capture_model import capture


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.a(x), {"more": self.b(x).relu()}


def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    a, b = module(x)
    return [a, b["more"]]


def test_it_is_the_share_of_the_variance_that_outputs_are_off_by() -> None:
    torch.manual_seed(0)
    batches = [[torch.randn(n, 6)] for n in (5, 30)]
    captured = capture(Two(), batches[0][0])
    facts, first, other = provenance(captured), captured.module, capture(Two(), batches[0][0]).module
    settings = Settings(rows=64, seed=0, held=False, reduce=lambda value: value)

    def found(merged: Any) -> float:
        return output_error(Pair(original=first, facts=facts, rectified={}, merged=merged), batches, settings)

    x = torch.cat([batch[0] for batch in batches])
    pairs = zip(outputs(first, x), outputs(other, x), strict=True)
    wanted = [float((y - z).square().sum() / (y - y.mean()).square().sum()) for y, z in pairs]
    assert found(other) == pytest.approx(sum(wanted) / 2, rel=1e-5) and min(wanted) > 0.1
    assert found(capture(first, batches[0][0]).module) == 0
    with torch.no_grad():
        other.get_parameter("a.bias")[0] = torch.nan
    assert found(other) == float("inf")


def test_a_divergence_that_rounding_left_below_zero_is_none() -> None:
    words = torch.full((4,), 2.5, dtype=torch.float64)
    total = torch.cat([torch.tensor([-1e-9, 13.0, 10.0], dtype=torch.float64), words])
    assert relative([total], lambda value: value) == 0


def test_a_quarter_of_the_samples_is_held_out() -> None:
    batches = [[torch.arange(4) + 4 * n, "mode"] for n in range(9)]
    fit, held = halves(batches, True)
    assert (len(fit), len(held)) == (7, 2) and torch.equal(held[0][0], batches[7][0])
    fit, held = halves([[torch.arange(10), torch.ones(3), None]], True)
    assert torch.equal(torch.cat([b[0] for b in fit + held]), torch.arange(10))
    assert len(held) == 1 and 2 <= len(held[0][0]) <= 3 and len(held[0][1]) == 3
    for whole in ([[torch.zeros(1, 3)]], [[torch.zeros(8, 3)]]):
        fit, held = halves(whole, len(whole[0][0]) == 1)
        assert torch.equal(fit[0][0], whole[0][0]) and torch.equal(held[0][0], whole[0][0])
