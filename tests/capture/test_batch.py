"""A model captured by torch.export runs on any batch size after the merge, if the original does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import verify
from fxmerge.graph import compare
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Windows(nn.Module):
    """Attention in windows, which are moved to the batch axis, and a check that symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, 16, 1), nn.Linear(16, 48), nn.Linear(16, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or not bool(torch.tensor(x.shape[-1] % 4 == 0)):
            raise ValueError("an image of windows is wanted")
        x = self.stem(x)
        b, c, h, w = x.shape
        x = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        q, k, v = self.qkv(x).reshape(x.shape[0], 16, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, -1, 16, 4)
        x = (torch.softmax(q @ k.transpose(1, 2), -1) @ v).reshape(-1, 4, 16, 4).transpose(1, 2).flatten(2)
        return self.out(torch.relu(self.proj(x))).view(b, -1, 3)


class Choosing(Windows):
    """A single sample takes another path, so that the batch size cannot be dynamic."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x) if len(x) == 1 else super().forward(x)


def made(cls: type[nn.Module], samples: int) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return randomised(cls()).double().eval(), torch.randn(samples, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("heads", ["width", "whole"])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_runs_on_other_numbers_of_samples(samples: int, heads: str) -> None:
    model, x = made(Windows, samples)
    result = plain_merge(model, x, heads=heads)
    assert result.analysis.captured.route == "export"
    channels = {"width": {16, 8, 32}, "whole": {16, 8, 4}}[heads]
    assert {p.channels for p in result.plan.groups} | {16} == channels | {16}, result.report.refusals
    for other in (1, 2, 3):
        y = torch.randn(other, 3, 8, 8, dtype=torch.float64)
        with torch.no_grad():
            whole, alone = result.module(y), torch.cat([result.module(one[None]) for one in y])
        assert compare.difference([alone], [whole]) < 1e-10
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10


@pytest.mark.parametrize("samples", [1, 4])
def test_is_the_original_when_nothing_goes(samples: int) -> None:
    model, x = made(Windows, samples)
    merged = fxmerge.merge(model, x, ratio=0.0).module
    for other in (1, 3, 6):
        y = torch.randn(other, 3, 8, 8, dtype=torch.float64)
        with torch.no_grad():
            assert compare.difference([model(y)], [merged(y)]) < 1e-12


@pytest.mark.parametrize("samples", [1, 2])
def test_a_number_of_samples_that_matters_is_kept(samples: int) -> None:
    model, x = made(Choosing, samples)
    result = plain_merge(model, x, ratio=0.0)
    assert result.report.verdict.error == 0
    assert plain_merge(model, x).plan.groups


def test_inputs_of_different_lengths_are_taken_as_they_are() -> None:
    class Two(Windows):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return super().forward(x) + table.sum(0)

    model, x = made(Two, 2)
    result = plain_merge(model, (x, torch.ones(5, 3, dtype=torch.float64)))
    assert result.plan.groups
