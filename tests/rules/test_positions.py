"""Products with a parameter over positions, or over blocks of channels: it treats all channels alike, and stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import Options, Plan, verify
from fxmerge.plan import GroupPlan
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
LAYERS: dict[str, Callable[[], nn.Module]] = {  # of positions, on axis 1
    "convolution": lambda: nn.Conv1d(6, 6, 1),
    "BatchNorm": lambda: nn.BatchNorm1d(6),
    "InstanceNorm": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
}
OWN: dict[str, tuple[Step, tuple[int, ...]]] = {  # a matrix for each channel
    "einsum": (lambda m, h: torch.einsum("bcn,cnm->bcm", h.mT, m.A).mT, (12, 6, 6)),
    "moved": (lambda m, h: torch.einsum("bcn,cmn->bcm", h.mT, m.A.mT).mT, (12, 6, 6)),
    "matmul": (lambda m, h: (h.mT.unsqueeze(2) @ m.A).squeeze(2).mT, (12, 6, 6)),
}


class Mapped(nn.Module):
    def __init__(self, step: Step, shape: tuple[int, ...] | nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.A = shape if isinstance(shape, nn.Module) else nn.Parameter(torch.zeros(shape))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.step(self, self.first(x)))
        return self.last(torch.relu(h + self.step(self, self.second(h))))


def made(step: Step, shape: tuple[int, ...] | nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
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


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_positions_lets_channels_pass(name: str) -> None:
    """Its bias is not that of a channel, so that partners are merged without a scale."""
    model, x, unseen = made(lambda m, h: m.A(h), LAYERS[name]())
    error, result = error_of_silence(model, x, unseen, ratio=0.5)
    assert error < 1e-12
    found = result.analysis
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("first", 6)]
    assert found.groups[0].scale_blocks
    assert ("A", True) in {(r.name, "positions, not channels" in r.reason) for r in result.report.refusals}
    copied, inputs, kept = verify.duplicate(found.captured, found.facts, found.grouping)
    plans = tuple(GroupPlan(name, 12, tuple(stays.tolist())) for name, stays in kept.items())
    merged = fxmerge.apply(Plan(Options(threshold=0.0, refit="none"), plans), copied, inputs)
    assert plans
    assert merged.report.verdict.error < 1e-10


def test_channels_that_cannot_leave_alone_are_refused_with_the_place() -> None:
    """ECA: a convolution along the channels. Nothing of such a layer can be dropped, and the report says why."""
    attention = nn.Conv1d(1, 1, 3, padding=1)
    model, x, _ = made(lambda m, h: h * torch.sigmoid(m.A(h.mean(1, keepdim=True))), attention)
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups == ()
    reasons = {r.name: (r.channels, r.reason) for r in result.report.refusals}
    assert reasons["first"][0] == 12
    assert "tied to each other at a" in reasons["first"][1].lower()


@pytest.mark.parametrize("moved", ["sdpa", "mT"])
def test_learned_queries_are_members_of_the_group_that_narrows_them(moved: str) -> None:
    """Not "has no channels of its own": they lose the same channels as the keys that they meet."""

    def step(m: Any, h: Tensor) -> Tensor:
        if moved == "mT":
            return h * (h @ m.A.unsqueeze(0).mT).softmax(-1).amax(-1, keepdim=True)
        return h + torch.nn.functional.scaled_dot_product_attention(m.A.expand(len(h), 6, 12), h, h)

    model, x, _ = made(step, (6, 12))
    result = plain_merge(model, x, ratio=0.5)
    assert "A" not in {r.name for r in result.report.refusals}
    assert any(m.layer.module == "A" for g in result.analysis.groups for m in g.per_channel_params)
    assert result.module.get_parameter("A").shape == (6, 6)
