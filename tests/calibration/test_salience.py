"""Positions that the outputs depend on are drawn more often for the survey."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration import patches, salience
from fxmerge.calibration.paired_run import Settings
from fxmerge.calibration.patches import Form, sample
from fxmerge.capture.capture_model import capture
from fxmerge.pipeline import prepared

CONV = Form(op="conv", kernel=(1, 1), stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
SETTINGS = Settings(rows=100, seed=0, held=False, reduce=lambda t: t)


class Corner(nn.Module):
    """Returns one corner of what two convolutions compute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu_())[:, :, :1, :2]


def salient(model: nn.Module, x: Tensor, batches: list[list[Tensor]]) -> dict[str, list[Tensor]]:
    ready = prepared(model.eval(), x, fxmerge.Options(), None, lambda *_: None)
    facts = ready.found[0]
    layers = {layer.node: layer for layer in facts.layers}
    return salience.salience(ready.captured, facts, layers, batches, SETTINGS)


@pytest.mark.parametrize("at_a_time", [8, 3])
def test_positions_without_influence_have_none(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Corner(), torch.randn(2, 2, 6, 5)
    batches = [[torch.randn(8, 2, 6, 5)], [torch.randn(4, 2, 6, 5)]]
    each = sum(torch.Size(s).numel() for s in capture(model.eval(), x).shapes.values()) // 2
    monkeypatch.setattr(salience, "ELEMENTS", each * at_a_time)  # batches are cut
    found = salient(model, x, batches)
    for name, height, width in (("first", 2, 3), ("second", 1, 2)):  # a 3 x 3 kernel sees more around the corner
        at = torch.zeros(6, 5, dtype=torch.bool)
        at[:height, :width] = True
        for own, (batch,) in zip(found[name], batches, strict=True):
            maps = own.view(len(batch), 6, 5)
            assert not maps[:, ~at].any()
            assert (maps.sum(0)[at] > 0).all()


def test_squares_of_slopes_before_an_op_that_writes_in_place() -> None:
    """The salience of `first` is before its ReLU: 0 where no channel is positive."""
    model, x = Corner(), torch.randn(2, 2, 4, 4)
    nn.init.constant_(model.first.bias, -100.0)
    (found,) = salient(model, x, [[torch.randn(4, 2, 4, 4)]])["first"]
    assert not found.any()


def test_an_op_without_a_gradient() -> None:
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.second(self.first(x).relu()) > 0).int().float()

    assert salient(Signs(), torch.randn(2, 2, 4, 4), [[torch.randn(4, 2, 4, 4)]]) == {}


def test_one_output_for_a_sample() -> None:
    """A classifier has no positions that its outputs could be at."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert salient(model, torch.randn(2, 2, 4, 4), [[torch.randn(4, 2, 4, 4)]]) == {}


def test_half_of_the_rows_are_drawn_by_salience() -> None:
    outputs = [torch.zeros(2, 3, 10, 10), torch.zeros(2, 3, 10, 10)]
    known = [torch.zeros(200), torch.zeros(200)]
    known[0][7], known[1][3] = 3.0, 1.0
    one, other = sample(outputs, CONV, 80, torch.Generator().manual_seed(0), lambda t: t, salience=known)
    assert 79 <= len(one) + len(other) <= 81
    assert abs(int((one == 7).sum()) - 30) <= 1 and abs(int((other == 3).sum()) - 10) <= 1
    assert torch.equal(one, one.sort().values)


def test_nothing_depends_on_any_position() -> None:
    outputs, generator = [torch.zeros(2, 3, 10, 10)], torch.Generator().manual_seed(0)
    (index,) = sample(outputs, CONV, 50, generator, lambda t: t, salience=[torch.zeros(200)])
    assert len(index) == len(index.unique()) == 50


class Rare(nn.Module):
    """Knows by its last channel, at one position in 1,500, what its output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 1, 1)
        self.first.weight.data = torch.eye(4)[..., None, None] + 0.01 * torch.randn(4, 4, 1, 1)
        self.second.weight.data = torch.tensor([1.0, -1.0, 1.0, 4.0]).view(1, 4, 1, 1)
        self.second.bias.data.fill_(-13.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).sigmoid()


def rare(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 30, 30, generator=generator)
    x[:, 3] = 3.0 * (torch.rand(count, 30, 30, generator=generator) < 1 / 1500)
    return x


@pytest.mark.parametrize(("share", "keeps"), [(patches.SALIENT, True), (0.0, False)])
def test_a_rare_feature_stays(share: float, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(patches, "SALIENT", share)
    model, data, test = Rare().eval(), rare(64, 0), rare(64, 1)
    result = fxmerge.merge(model, data[:2], ratio=0.25, refit="calibration", calibration=list(data.split(16)))
    with torch.no_grad():
        expected, actual = model(test), result.module(test)
    error = float((actual - expected).square().sum() / (expected - expected.mean()).square().sum())
    assert (error < 0.5) == keeps
