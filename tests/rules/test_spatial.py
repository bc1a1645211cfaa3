"""A vector that is folded into an image: what mixes places makes one channel of them, what does not leaves them be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS, SIDE = 16, 4
Op = Callable[[Tensor], Tensor]


class Folded(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op, self.a = op, nn.Linear(6, CHANNELS * SIDE * SIDE)
        self.b = nn.Linear(op(torch.rand(1, CHANNELS, SIDE, SIDE)).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        image = F.relu(self.a(x)).view(-1, CHANNELS, SIDE, SIDE)
        out: Tensor = self.b(self.op(image).flatten(1))
        return out


MIXING: dict[str, Op] = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool of the same size": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool of the same size": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "lp_pool": lambda x: F.lp_pool2d(x + 1, 2.0, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate to the same size": lambda x: F.interpolate(x, size=(SIDE, SIDE), mode="bilinear"),
    "grid_sample": lambda x: F.grid_sample(x, x.new_zeros(x.size(0), 2, 2, 2), align_corners=False),
}
APART: dict[str, Op] = {"relu": F.relu, "dropout": lambda x: F.dropout2d(x, 0.5, False), "flip": lambda x: x.flip(-1)}


def merged(op: Op) -> tuple[fxmerge.Result, float]:
    torch.manual_seed(0)
    result = plain_merge(randomised(Folded(op)).eval(), torch.randn(2, 6), ratio=0.5, decomposition="prune")
    found = result.analysis
    return result, max(fxmerge.verify.permutation(found.captured, found.facts, found.grouping).values())


@pytest.mark.parametrize("name", MIXING)
def test_places_that_are_mixed_are_one_channel(name: str) -> None:
    result, error = merged(MIXING[name])
    (plan,) = result.plan.groups
    assert error < 1e-10 and (plan.channels, len(plan.kept)) == (CHANNELS, CHANNELS // 2)
    assert result.module.get_parameter("a.weight").size(0) == CHANNELS // 2 * SIDE * SIDE


@pytest.mark.parametrize("name", APART)
def test_places_that_are_not_mixed_are_channels_of_their_own(name: str) -> None:
    result, error = merged(APART[name])
    (plan,) = result.plan.groups
    assert error < 1e-10 and plan.channels == CHANNELS * SIDE * SIDE and len(plan.kept) == plan.channels // 2


@pytest.mark.parametrize("same", [True, False])
def test_pooling_over_the_channels_holds_them(same: bool) -> None:
    """Tokens (batch, tokens, channels) that are pooled along the last axis, of the same size or of another."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8 if same else 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            out: Tensor = self.b(F.max_pool1d(y, 3, 1, 1) if same else F.max_pool1d(y, 2))
            return out

    found = fxmerge.analyze(randomised(Pooled()).eval(), torch.randn(2, 6, 5))
    assert not found.groups and any("mixes the channels" in r.reason for r in found.refusals if r.name == "a")


class Shuffled(nn.Module):
    def __init__(self, shuffle: Op, op: Op) -> None:
        super().__init__()
        self.shuffle, self.op, self.a = shuffle, op, nn.Conv2d(3, 4 * CHANNELS, 1)
        with torch.no_grad():
            self.b = nn.Linear(op(shuffle(torch.rand(1, 4 * CHANNELS, SIDE, SIDE))).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.op(self.shuffle(self.a(x))).flatten(1))
        return out


SHUFFLES: dict[str, Op] = {"module": nn.PixelShuffle(2), "function": lambda x: F.pixel_shuffle(x, 2)}
AFTER: dict[str, Op] = {
    "nothing": lambda x: x,
    "a mean over rows": lambda x: x.mean(2),
    "a mean over columns": lambda x: x.mean(3),
    "a mean over both": lambda x: x.mean((2, 3)),
    "less the mean over columns": lambda x: x - x.mean(3, keepdim=True),
    "a norm along columns": lambda x: F.normalize(x, dim=3),
    "softmax along rows": lambda x: x.softmax(2),
    "the largest of each column": lambda x: x * x.amax(2, keepdim=True),
    "half of the rows": lambda x: x[:, :, :SIDE],
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel_unshuffle by another factor": lambda x: F.pixel_unshuffle(x, 4),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_pixels_of_one_channel_leave_together(shuffle: str, after: str) -> None:
    """Each channel after pixel_shuffle comes from four. Without its rows and what reads it, the rest is as before."""
    torch.manual_seed(0)
    model = randomised(Shuffled(SHUFFLES[shuffle], AFTER[after])).double().eval()
    x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    found = result.analysis
    assert max(fxmerge.verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    (plan,) = result.plan.groups
    assert (plan.channels, len(plan.kept)) == (CHANNELS, CHANNELS // 2)
    dropped = sorted(set(range(CHANNELS)) - set(plan.kept))
    silent = randomised(Shuffled(SHUFFLES[shuffle], AFTER[after])).double().eval()
    silent.load_state_dict(model.state_dict())
    with torch.no_grad():
        silent.b.weight.view(3, CHANNELS, -1)[:, dropped] = 0
        assert (silent(x) - result.module(x)).norm() < 1e-10 * silent(x).norm()
        assert (silent(x) - model(x)).norm() > 1e-3 * model(x).norm()
