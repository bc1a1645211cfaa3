"""Code that asks whether a value is a tensor, which a proxy of torch.fx is not: its graph comes from torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.silencing import error_of_silence


class Asking(nn.Module):
    """Concatenates two branches if the second is a tensor, and else leaves the second out, or fails."""

    def __init__(self, asks: Any, fails: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)
        self.asks, self.fails = asks, fails

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.relu(self.a(x)), torch.relu(self.b(x))
        if self.asks(second):
            both = torch.cat([first, second], 1)
        else:
            both = first if self.fails else torch.cat([first, torch.zeros_like(first)], 1)
        y: Tensor = self.c(both)
        return y


@pytest.mark.parametrize("asks", [lambda v: isinstance(v, Tensor), lambda v: torch.jit.isinstance(v, Tensor)])
@pytest.mark.parametrize("fails", [True, False])
def test_the_branch_that_the_model_takes_is_captured(asks: Any, fails: bool) -> None:
    torch.manual_seed(0)
    x, unseen = torch.randn(2, 3, 5, 5), torch.randn(3, 3, 5, 5)
    error, result = error_of_silence(Asking(asks, fails), x, unseen, ratio=0.5)
    assert error < 1e-6
    assert {g.name for g in result.plan.groups if len(g.kept) < g.channels} == {"a", "b"}
