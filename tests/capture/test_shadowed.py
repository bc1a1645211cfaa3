"""A model may hold an attribute with the name of a method of `nn.Module`, as ESPNet's list `modules`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.graph.compare import difference


class Shadowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3)
        self.modules = [self.a, self.b]  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(x)))
        return out


def test_it_is_merged_refitted_and_saved_and_comes_back_in_its_class(tmp_path: Path) -> None:
    model, x = Shadowed().train(False), torch.randn(2, 3, 9, 9)
    result = fxmerge.merge(model, x, ratio=0.5, samples=64)
    assert any(layer.solved for layer in result.report.refitted)
    own = result.model
    assert isinstance(own, Shadowed) and own.a.out_channels == 6
    assert difference([own(x)], [result.module(x)]) < 1e-5 < difference([own(x)], [model(x)])
    assert own.modules[0] is own.a and own.modules[1] is own.b  # type: ignore[index]
    result.save(tmp_path / "saved")
    assert difference([fxmerge.load(tmp_path / "saved")(x)], [result.module(x)]) < 1e-6
