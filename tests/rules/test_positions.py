"""Products with a parameter over positions, or over blocks of channels: it treats all channels alike, and stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmerge import verify
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.silencing import error_of_silence

pytestmark = pytest.mark.usefixtures("one_thread")

Step = Callable[[Any, Tensor], Tensor]


def heads(h: Tensor) -> Tensor:
    """(batch, 6, 12) -> (batch, 6, 3, 4)"""
    return h.unflatten(-1, (3, 4))


ALIKE: dict[str, tuple[Step, tuple[int, ...]]] = {  # a step, and the shape of its parameter A
    "adjacency": (lambda m, h: m.A @ h, (6, 6)),
    "transposed": (lambda m, h: m.A.t() @ h, (6, 6)),
    "attention": (lambda m, h: torch.matmul(m.A.softmax(-1), h), (6, 6)),
    "from the right": (lambda m, h: (h.mT @ m.A).mT, (6, 6)),
    "einsum": (lambda m, h: torch.einsum("mn,bnc->bmc", m.A, h), (6, 6)),
    "einsum from the right": (lambda m, h: torch.einsum("bnc,nm->bmc", h, m.A), (6, 6)),
    "several": (lambda m, h: torch.einsum("bnc,knm->bmc", h, m.A), (2, 6, 6)),
    "Chebyshev": (lambda m, h: 2 * m.A @ (m.A @ h) - h, (6, 6)),
    "between blocks": (lambda m, h: torch.einsum("bnkc,kl->bnlc", heads(h), m.A).flatten(2), (3, 3)),
    "for each block": (lambda m, h: torch.einsum("bnkc,knm->bmkc", heads(h), m.A).flatten(2), (3, 6, 6)),
    "sum of blocks": (lambda m, h: torch.einsum("bnkc,knm->bmc", heads(h), m.A).repeat(1, 1, 3), (3, 6, 6)),
}
OWN: dict[str, tuple[Step, tuple[int, ...]]] = {  # a matrix for each channel
    "einsum": (lambda m, h: torch.einsum("bcn,cnm->bcm", h.mT, m.A).mT, (12, 6, 6)),
    "moved": (lambda m, h: torch.einsum("bcn,cmn->bcm", h.mT, m.A.mT).mT, (12, 6, 6)),
    "matmul": (lambda m, h: (h.mT.unsqueeze(2) @ m.A).squeeze(2).mT, (12, 6, 6)),
}


class Mapped(nn.Module):
    def __init__(self, step: Step, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.A, self.step = nn.Parameter(torch.zeros(shape)), step

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.step(self, self.first(x)))
        return self.last(torch.relu(h + self.step(self, self.second(h))))


def made(step: Step, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    model = randomised(Mapped(step, shape)).eval().double()
    return model, torch.randn(2, 6, 8).double(), torch.randn(3, 6, 8).double()


@pytest.mark.parametrize("name", ALIKE)
def test_channels_pass_a_parameter_that_treats_them_alike(name: str) -> None:
    model, x, unseen = made(*ALIKE[name])
    error, result = error_of_silence(model, x, unseen, ratio=0.5)
    assert error < 1e-7 if name == "attention" else error < 1e-12  # the softmax is folded in single precision
    found, half = result.analysis, result.plan.groups[0]
    assert half.name == "first"
    assert 2 * len(half.kept) == half.channels
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-12


def test_a_sum_of_blocks_leaves_at_the_same_places_of_all() -> None:
    """As in a graph convolution on skeletons: each subset of the edges has its channels, which are added up."""

    def step(m: Any, h: Tensor) -> Tensor:
        return torch.einsum("bnkc,knm->bmc", h.unflatten(-1, (3, 4)), m.A)

    model = Mapped(step, (3, 6, 6))
    model.second, model.last = nn.Linear(4, 12), nn.Linear(4, 4)
    randomised(model).eval().double()
    error, result = error_of_silence(model, torch.randn(2, 6, 8).double(), torch.randn(3, 6, 8).double(), ratio=0.5)
    assert error < 1e-12
    assert [(p.name, p.channels, len(p.kept)) for p in result.plan.groups] == [("first", 4, 2)]


@pytest.mark.parametrize("name", OWN)
def test_a_matrix_for_each_channel_is_refused(name: str) -> None:
    model, x, _ = made(*OWN[name])
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups == ()
    assert {r.name for r in result.report.refusals} >= {"first", "second"}
    torch.testing.assert_close(result.module(x), model(x))
