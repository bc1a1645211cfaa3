"""Rotary embeddings, in the ways that people write them: pairs of channels leave with their angles, of all heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import verify
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, SIZE, TOKENS = 4, 8, 6


class Halves(nn.Module):
    """Channel i turns with channel i + d / 2; the angles are positions times a buffer of frequencies."""

    groups, turned = HEADS, SIZE  # heads of keys and values; how many channels of each head turn

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Linear(5, 12)
        self.q = nn.Linear(12, HEADS * SIZE)
        self.k, self.v = nn.Linear(12, self.groups * SIZE), nn.Linear(12, self.groups * SIZE)
        self.o, self.out = nn.Linear(HEADS * SIZE, 7), nn.Linear(7, 3)
        self.register_buffer("freq", 1 / 100 ** (torch.arange(0, self.turned, 2) / self.turned))

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        turns = torch.arange(length)[:, None] * self.freq
        both = torch.cat([turns, turns], -1)
        return both.cos(), both.sin()

    def half(self, x: Tensor) -> Tensor:
        one, other = x[..., : self.turned // 2], x[..., self.turned // 2 :]
        return torch.cat([-other, one], -1)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + self.half(x) * sin

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.emb(x))
        q, k, v = (f(x).view(-1, TOKENS, n, SIZE).transpose(1, 2)
                   for f, n in ((self.q, HEADS), (self.k, self.groups), (self.v, self.groups)))  # fmt: skip
        cos, sin = self.angles(x.shape[1])
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        k, v = (t.repeat_interleave(HEADS // self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, TOKENS, HEADS * SIZE)
        return self.out(F.relu(self.o(y)))  # type: ignore[no-any-return]


class Outer(Halves):
    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        turns = torch.outer(torch.arange(length).to(self.freq), self.freq)
        both = torch.cat([turns, turns], -1)
        return both.cos(), both.sin()


class Einsum(Halves):
    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        turns = torch.einsum("i,j->ij", torch.arange(length).to(self.freq), self.freq)
        return torch.cat([turns, turns], -1).cos(), torch.cat([turns, turns], -1).sin()


class Product(Halves):
    """A matrix product of the frequencies, spread over the samples, with the positions."""

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        turns = (self.freq[None, :, None] @ torch.arange(length).to(self.freq)[None, None, :]).transpose(1, 2)
        both = torch.cat([turns, turns], -1)[:, None]
        return both.cos(), both.sin()


class GroupedQueries(Halves):
    groups = 2


class Partly(Halves):
    """Half of the channels of each head turn, the others pass."""

    turned = SIZE // 2

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, passed = x[..., : self.turned], x[..., self.turned :]
        return torch.cat([super().turn(turned, cos, sin), passed], -1)


class Interleaved(Halves):
    """Channel 2 i turns with channel 2 i + 1."""

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        turns = (torch.arange(length)[:, None] * self.freq).repeat_interleave(2, -1)
        return turns.cos(), turns.sin()

    def half(self, x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Literal(Halves):
    """A length that the trace takes for a constant: the tables are constants too."""

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        return super().angles(TOKENS)


class Tables(Halves):
    """Cosines and sines are buffers, longer than the example."""

    def __init__(self) -> None:
        super().__init__()
        cos, sin = Halves.angles(self, TOKENS + 3)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        return self.cos[:length], self.sin[:length]


ROTARY = [Halves, Outer, Einsum, Product, GroupedQueries, Partly, Interleaved, Literal, Tables]
every = pytest.mark.parametrize("cls", ROTARY, ids=lambda c: c.__name__)


def built(cls: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = cls()
    tables = {name: value.clone() for name, value in model.named_buffers()}
    model = randomised(model).double().eval()
    for name, value in tables.items():
        setattr(model, name, value.double())
    return model, torch.randn(2, TOKENS, 5, dtype=torch.float64)


@every
def test_permutation(cls: Any) -> None:
    found = fxmerge.analyze(*built(cls))
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    assert {r.name for r in found.refusals} == {"out"}


@every
def test_no_member_is_superfluous(cls: Any) -> None:
    found = fxmerge.analyze(*built(cls))
    assert min(verify.overcoupling(found.captured, found.facts, found.grouping).values()) > 1e-6


@every
def test_pairs_leave_with_their_angles(cls: Any) -> None:
    """What is left gives what the model gives with the rows of the pairs that left at zero."""
    model, x = built(cls)
    result = plain_merge(model, x, ratio=0.5, ignore=("emb", "v", "o"), decomposition="mostsim")
    assert len(dict(result.module.named_parameters())["q.weight"]) == HEADS * SIZE // 2
    kept = [p for p in result.plan.groups if p.name.startswith("q")]
    rows = torch.zeros(HEADS * SIZE, dtype=torch.bool)
    groups = {g.name: g for g in result.analysis.groups}
    for p in kept:
        assert len(p.kept) * 2 == p.channels
        for producer in groups[p.name].producers:
            if producer.layer.module == "q":
                rows[producer.where[producer.local(torch.tensor(p.kept))[1]].flatten()] = True
    with torch.no_grad():
        model.q.weight[~rows], model.q.bias[~rows] = 0, 0
        torch.testing.assert_close(result.module(x), model(x), rtol=1e-10, atol=1e-10)


@every
def test_whole_heads_leave_with_their_angles_shared(cls: Any) -> None:
    model, x = built(cls)
    result = plain_merge(model, x, heads="whole", ratio=0.5)
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    assert len(dict(result.module.named_parameters())["q.weight"]) == HEADS * SIZE // 2
    assert all(tuple(b.shape) == tuple(dict(model.named_buffers())[n.removesuffix("_folded")].shape)
               for n, b in result.module.named_buffers() if n.removesuffix("_folded") in dict(model.named_buffers()))


def test_an_angle_that_differs_by_position_and_channel_stays() -> None:
    """Positions that are a constant with an entry for each channel cannot follow."""

    class Own(Halves):
        def angles(self, length: int) -> tuple[Tensor, Tensor]:
            turns = torch.arange(length * SIZE // 2).view(length, -1) * self.freq
            both = torch.cat([turns, turns], -1)
            return both.cos(), both.sin()

    model, x = built(Own)
    result = plain_merge(model, x, ratio=0.5)
    refused = {r.name: r.reason for r in result.report.refusals}
    assert {"q", "k"} <= set(refused)
    assert len(dict(result.module.named_parameters())["q.weight"]) == HEADS * SIZE
    with torch.no_grad():
        assert result.module(x).shape == model(x).shape
