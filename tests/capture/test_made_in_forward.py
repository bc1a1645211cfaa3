"""Modules without tensors that are no submodules of the model: made in forward, kept in a list, or shared by a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from tests.helpers.silencing import error_of_silence

SHARED = nn.ReLU()


class Halves(nn.Module):
    """A module without tensors that has modules without tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(x) / 2
        return y


class Net(nn.Module):
    """Two convolutions, and between them what `made` returns."""

    def __init__(self, made: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.made, self.kept = made, [nn.ReLU()]
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.made(self)(self.a(x)))
        return y


@pytest.mark.parametrize(
    "made",
    [
        lambda net: nn.ReLU(inplace=True),
        lambda net: nn.UpsamplingBilinear2d(scale_factor=2),
        lambda net: nn.Sequential(nn.AvgPool2d(2), Halves()),
        lambda net: net.kept[0],
        lambda net: SHARED,
    ],
)
def test_they_are_traced_and_other_sizes_are_taken(made: Callable[[Any], nn.Module]) -> None:
    torch.manual_seed(0)
    unseen = torch.randn(3, 3, 14, 10)
    error, result = error_of_silence(Net(made), torch.randn(2, 3, 8, 8), unseen, ratio=0.5)
    assert error < 1e-6
    assert [(g.name, len(g.kept)) for g in result.plan.groups] == [("a", 4)]
    assert isinstance(result.module.get_submodule("a"), nn.Conv2d)


def test_one_that_asks_for_the_shape_of_its_input_is_called(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, unseen = Net(lambda net: nn.Softmax2d()), torch.randn(2, 3, 8, 8), torch.randn(1, 3, 5, 9)
    result = fxmerge.merge(model, x, ratio=0.5, refit="none")
    assert [type(m) for m in result.module.children()] == [nn.Conv2d, nn.Softmax2d, nn.Conv2d]
    assert result.analysis.groups[0].mixers == ("softmax2d_0",)
    assert result.model is not None
    assert torch.equal(result.model(unseen), result.module(unseen))
    result.save(tmp_path / "saved")
    assert torch.equal(fxmerge.load(tmp_path / "saved")(unseen), result.module(unseen))
    assert list(model.children()) == [model.a, model.b]
