"""Calls that are spelled in less usual ways: numpy's names, in-place updates, products with raw parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import verify
from fxmerge.graph import compare
from tests.helpers.netmaking import Net, one_thread, plain_merge, randomised, raw  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def made(wiring: Any, *shape: int, **parts: Any) -> tuple[nn.Module, Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return randomised(Net(wiring, **copy.deepcopy(parts))).double().eval(), x


def error(found: fxmerge.Analysis) -> float:
    return max(verify.permutation(found.captured, found.facts, found.grouping).values())


@pytest.mark.parametrize("spelling", [{"axis": 2, "keepdims": True}, {"dim": 2, "keepdim": True}, {"axis": 3}])
def test_axis_is_dim(spelling: dict[str, Any]) -> None:
    conv = nn.Conv2d if len(spelling) == 2 else nn.Conv1d
    consumer = conv(8, 4, 1)
    model, x = made(lambda m, x: m.b(m.a(x).mean(**spelling)), 2, 3, 6, 6, a=nn.Conv2d(3, 8, 3), b=consumer)
    result = plain_merge(model, x, ratio=0.5)
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("a", 4)]
    assert error(result.analysis) < 1e-10


@pytest.mark.parametrize("op", ["matmul", "@", "mm"])
@pytest.mark.parametrize("decomposition", ["lstsq", "fold", "mostsim", "prune"])
def test_a_product_with_a_raw_parameter(op: str, decomposition: str) -> None:
    """Where a decomposition moves a constant into the product's bias, which it has none of, it is added behind it."""
    multiply = {"matmul": torch.matmul, "@": lambda a, b: a @ b, "mm": torch.mm}[op]
    model, x = made(
        lambda m, x: m.b(F.relu(multiply(F.relu(m.a(x)), m.w))),
        *(9, 6), a=nn.Linear(6, 8), w=raw(8, 12), b=nn.Linear(12, 4),
    )  # fmt: skip
    result = plain_merge(model, x, ratio=0.5, decomposition=decomposition)
    held = {name: tuple(p.shape) for name, p in result.module.named_parameters() if name.startswith("w")}
    assert held == {"w": (4, 6)} | ({"w_bias": (6,)} if decomposition == "lstsq" else {})
    assert error(result.analysis) < 1e-10


def test_a_constant_behind_a_product_is_the_right_one() -> None:
    """Channels that are constant can all be dropped: `lstsq` must put what they gave into the added bias."""
    model, x = made(lambda m, x: torch.sigmoid(m.a(x)) @ m.w, 9, 6, a=nn.Linear(6, 8), w=raw(8, 5))
    with torch.no_grad():
        model.a.weight[4:] = 0  # type: ignore[union-attr, index]
    result = plain_merge(model, x, ratio=0.5, decomposition="lstsq")
    assert result.plan.groups[0].kept == (0, 1, 2, 3)
    assert result.report.verdict.error < 1e-8


def test_fold_leaves_no_bias_on_a_table() -> None:
    """An embedding has no bias to move a constant into."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        return m.c(F.relu(m.b(m.e(x) + m.p)).mean(1))

    model, _ = made(wiring, 1, e=nn.Embedding(9, 8), p=raw(6, 8), b=nn.Linear(8, 12), c=nn.Linear(12, 3))
    words = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(0))
    result = plain_merge(model, words, ratio=0.5, decomposition="fold")
    assert not hasattr(result.module.e, "bias")
    assert error(result.analysis) < 1e-10


def test_a_parameter_that_forward_writes_is_read_as_written() -> None:
    """Sizes are checked with the values that stand behind an update in place."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        m.p.clamp_(min=0.5)
        return m.b(F.relu(m.a(x)) * m.p.view(-1, 1, 1))

    model, x = made(wiring, 2, 3, 6, 6, a=nn.Conv2d(3, 8, 3), p=raw(8), b=nn.Conv2d(8, 4, 1))
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups == ()
    assert result.report.verdict.error == 0


def test_a_norm_over_the_channels_is_on_record() -> None:
    """Its result holds no channels, but the group that it measures is not exact."""
    model, x = made(
        lambda m, x: m.b(m.a(x) / m.a(x).norm(dim=-1, keepdim=True)), 4, 6, a=nn.Linear(6, 8), b=nn.Linear(8, 3)
    )  # fmt: skip
    found = fxmerge.analyze(model, x)
    assert [(g.name, len(g.mixers)) for g in found.groups] == [("a", 1)]
    assert error(found) < 1e-10


class Twice(nn.Module):
    """One weight without a bias, used in two calls behind a BatchNorm; channels i + 4 are eight times channels i."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.a, self.bn, self.head = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.Linear(4, 2)
        self.w, self.call = nn.Parameter(torch.empty(4, 8)), call
        randomised(self, 3)
        with torch.no_grad():
            self.a.weight[4:] = 8 * self.a.weight[:4]  # exact in float32

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.a(x)).transpose(1, 2)
        return self.head(self.call(h, self.w) * self.call(h.flip(1), self.w))


CALLS = {"linear": F.linear, "t()": lambda h, w: h @ w.t().contiguous(), "T": lambda h, w: torch.matmul(h, w.T),
         "mT": lambda h, w: h @ w.mT, "transpose": lambda h, w: torch.matmul(h, w.transpose(0, 1))}  # fmt: skip


@pytest.mark.parametrize("call", [*CALLS.values()], ids=[*CALLS])
def test_a_weight_of_two_calls_gives_both_its_new_bias(call: Any) -> None:
    """What a channel lacks of its partner is a constant, which both calls must add."""
    model, x = Twice(call).double().eval(), torch.randn(2, 3, 5, dtype=torch.float64)
    result = plain_merge(model, x, keep={"a": 4}, ratio=0.0, decomposition="mostsim", lam=1.0)
    assert len(result.plan.groups[0].kept) == 4
    assert compare.difference(compare.outputs(model, (x,)), compare.outputs(result.module, (x,))) < 1e-9


class Tied(nn.Module):
    """A head that is the embedding's table the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(10, 8), nn.Linear(8, 8)
        randomised(self, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.relu(self.a(self.table(ids))) @ self.table.weight.T


def test_a_head_that_is_the_table_turned_round_shares_its_channels() -> None:
    found = fxmerge.analyze(Tied().double(), torch.arange(4))
    assert [(g.name, g.channels) for g in found.groups] == [("table", 8)]
    assert error(found) < 1e-10
    merged = plain_merge(Tied().double(), torch.arange(4), ratio=0.5).module
    assert tuple(merged.table.weight.shape) == (10, 4) and merged(torch.arange(4)).shape == (4, 10)
