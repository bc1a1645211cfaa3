"""A raw parameter that meets one number of each sample: the product has the channels of the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmerge import verify
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

SPREAD: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {  # h has 12 channels, t is one number for each place
    "norm by hand": lambda m, h, t: h * (m.p * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)),
    "mask token": lambda m, h, t: h * (1 - t) + m.p * t,
    "frequencies": lambda m, h, t: h + torch.sin(t * m.p),
    "prototype": lambda m, h, t: h - m.one(h) * m.p,
}


class Spread(nn.Module):
    def __init__(self, step: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.one, self.last = nn.Linear(8, 12), nn.Linear(12, 1), nn.Linear(12, 4)
        self.p, self.step = nn.Parameter(torch.zeros(12)), step

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.step(self, self.first(x), x.mean(-1, keepdim=True))))


@pytest.mark.parametrize("name", SPREAD)
def test_a_parameter_spreads_a_number_over_its_own_channels(name: str) -> None:
    model, x = randomised(Spread(SPREAD[name])).eval().double(), torch.randn(2, 6, 8).double()
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    found = result.analysis
    assert [(p.name, p.channels, len(p.kept)) for p in result.plan.groups] == [("first", 12, 6)]
    assert result.module.get_parameter("p").shape == (6,)
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-12
    silence = verify.silence(found.captured, found.facts, found.grouping, result.plan)
    assert all(error < 1e-12 for error in silence.errors.values())
