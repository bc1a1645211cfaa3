"""Outputs whose lengths depend on values: a merged model may return others, and is not refused for that."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from fxmerge.graph.compare import judged


class Speaking(nn.Module):
    """Repeats the features of each token for as long as a layer says, as a speech synthesizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.encoder = nn.Embedding(20, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.length = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.decoder = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 2, 3, padding=1))

    def forward(self, ids: Tensor) -> Tensor:
        features = self.encoder(self.table(ids))
        times = (1 + 9 * self.length(features.cumsum(1)).squeeze(-1).sigmoid()).round().long()
        frames = torch.stack([row.repeat_interleave(n, 0)[:40] for row, n in zip(features, times, strict=True)])
        y: Tensor = self.decoder(frames.transpose(1, 2))
        return y


def test_a_model_that_decides_how_long_its_output_is() -> None:
    torch.manual_seed(2)
    model, ids = Speaking().eval(), torch.randint(0, 20, (1, 6))
    with torch.no_grad():
        model.length[2].weight.mul_(8)
    result = fxmerge.merge(model, ids, ratio=0.5, refit="none")
    with torch.no_grad():
        before, after = model(ids), result.module(ids)
    assert before.shape[-1] != after.shape[-1]
    assert after.shape[:2] == before.shape[:2]
    assert math.isnan(result.report.verdict.error)
    assert "the merged model's outputs have other lengths than the original's" in result.report.text(200)


class Cut(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.channels]


def test_a_size_that_does_not_depend_on_values_is_an_error() -> None:
    x = torch.randn(2, 5, 7)
    with pytest.raises(FxMergeError, match="outputs have other shapes than the original's"):
        judged(Cut(4), Cut(3), ((x,), {}), expected=[x[:, :4]], unsure=False, lengths_vary=True)
