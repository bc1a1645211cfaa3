"""The error of a merged graph's outputs, against the outputs of both models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxmerge.calibration.output_error import SAMPLES, output_error, some
from fxmerge.calibration.paired_run import Pair, Settings


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.a(x), {"more": self.b(x).relu()}


def test_it_is_the_share_of_the_variance_that_outputs_are_off_by() -> None:
    from fxmerge.ir.capture import Capture  # noqa: F401  (the graph below is captured as a merge does it)

    torch.manual_seed(0)
    first, other = (torch.fx.symbolic_trace(Two()) for _ in range(2))
    batches = [[torch.randn(n, 6)] for n in (5, 30)]
    settings = Settings(rows=64, seed=0, held=False, reduce=lambda value: value)
    pair = Pair(original=first, facts=_no_facts(), rectified={}, merged=other)
    x, wanted = torch.cat([b[0] for b in batches]), []
    for y, z in zip((first(x)[0], first(x)[1]["more"]), (other(x)[0], other(x)[1]["more"]), strict=True):
        wanted.append(float((y - z).square().sum() / (y - y.mean()).square().sum()))
    assert output_error(pair, batches, settings) == pytest.approx(sum(wanted) / 2, rel=1e-5)
    assert output_error(Pair(original=first, facts=_no_facts(), rectified={}, merged=first), batches, settings) == 0
    with torch.no_grad():
        other.a.bias[0] = torch.nan
    assert output_error(pair, batches, settings) == float("inf")


def test_the_last_batches_are_compared() -> None:
    batches = [[torch.full((100, 1), float(n))] for n in range(9)]
    assert [int(b[0][0]) for b in some(batches)] == [6, 7, 8] and SAMPLES == 256
    assert len(some(batches[:1])) == 1
