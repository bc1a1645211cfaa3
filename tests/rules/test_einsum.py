"""einsum in every form that it can be written in, and sums over blocks of channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import verify
from fxmerge.graph import compare
from fxmerge.rules.einsum import spelled
from tests.helpers.masking import masked_by_hand
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.sandwich import Sample

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {  # equation -> shapes of operands
    "ij,jk": [(2, 3), (3, 4)],
    "ba,cb": [(2, 3), (4, 2)],
    "...i,...i": [(5, 2, 3), (2, 3)],
    "...ij,...jk->...ik": [(6, 5, 2, 3), (5, 3, 4)],
    "i...->...": [(2, 3, 4)],
    "a...b->b...a": [(2, 3, 4)],
    "ij -> ji": [(2, 3)],
    "b": [(3,)],
    "ij,jk,kl->il": [(2, 3), (3, 4), (4, 5)],
    "bhqd,bhkd,bhkv": [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6)],
}


@pytest.mark.parametrize("equation", FORMS)
def test_an_equation_is_spelled_out(equation: str) -> None:
    operands = [torch.randn(s, dtype=torch.float64) for s in FORMS[equation]]
    inputs, out = spelled(equation, [o.dim() for o in operands])
    again = torch.einsum(f"{','.join(inputs)}->{out}", *operands)
    assert compare.difference([torch.einsum(equation, *operands)], [again]) < 1e-12


def activations(equation: str, *others: str, **facts: Any) -> Sample:
    """An einsum of x (2, 8, 4) and of what else is named: y, which is like x, or s (2, 4, 4) without channels."""

    def op(m: Any, x: Any) -> Any:
        known = {"y": lambda: m.second(m.input), "s": lambda: m.input.transpose(1, 2).matmul(m.input)}
        return torch.einsum(equation, x, *(known[o]() for o in others))

    parts = {"parts": {"second": None}} if "y" in others else {}
    return Sample(op, dims=1, **parts, **facts)


SAMPLES = {
    "bct->bct": activations("bct->bct"),
    "bct->btc": activations("bct->btc", reads=8, flat=True),
    "...t->...t": activations("...t->...t"),
    "b c t -> b c": activations("b c t -> b c", consumer_dims=0),
    "...ct,...ts": activations("...ct,...ts", "s"),
    "bct,bts->...bcs": activations("bct,bts->bcs", "s"),
    "bct,bct->bct": activations("bct,bct->bct", "y"),
    "bct,bts,bsu->bcu": activations("bct,bts,bsu->bcu", "s", "s"),
    "bct,bcs,bsu->bcu": activations("bct,bcs,bsu->bcu", "y", "s"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_channels_follow(name: str) -> None:
    model, x = SAMPLES[name].make()
    result = plain_merge(model, x, decomposition="prune", ratio=0.5)
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("producer", 4)], result.report.refusals
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    assert compare.difference([masked_by_hand(result, x)], compare.outputs(result.module, (x,))) < 1e-10


def test_queries_keys_and_values_at_once() -> None:
    """Three operands: scores in between hold no channels."""
    model, x = activations("bct,bcs,bds->bdt", "y", "y").make()
    result = plain_merge(model, x, decomposition="prune", ratio=0.5)
    found = result.analysis
    assert [g.name for g in found.groups] == ["producer"]
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10


def test_as_torch_export_spells_it() -> None:
    """aten.einsum takes its operands as one list, by name."""

    def op(m: Any, x: Any) -> Any:
        return torch.ops.aten.einsum.default("...ct,...ts", [x, m.input.transpose(1, 2).matmul(m.input)])

    model, x = Sample(op, dims=1).make()
    result = plain_merge(model, x, decomposition="prune", ratio=0.5)
    assert [p.name for p in result.plan.groups] == ["producer"], result.report.refusals
    assert compare.difference([masked_by_hand(result, x)], compare.outputs(result.module, (x,))) < 1e-10


class Places(nn.Module):
    """Scores from a table of relative places (MViT, SAM), some of whose rows are never taken."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.q, self.v, self.out = n, nn.Linear(3, 2 * n), nn.Linear(3, 2 * n), nn.Linear(2 * n, 3)
        self.table = nn.Parameter(torch.randn(15, n))
        self.register_buffer("apart", (torch.arange(6)[:, None] - torch.arange(6)) + 6)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (p(x).view(2, 6, 2, -1).transpose(1, 2) for p in (self.q, self.v))
        y = torch.einsum("bhqc,qkc->bhqk", q, self.table[self.apart]).softmax(-1) @ v
        return self.out(torch.relu(y.transpose(1, 2).flatten(2)))


def test_a_table_of_places_follows() -> None:
    model, x = randomised(Places(8)).double().eval(), torch.randn(2, 6, 3, dtype=torch.float64)
    result = plain_merge(model, x)
    smaller = {n: p.shape for n, p in result.module.named_parameters()}
    assert smaller == {n: p.shape for n, p in Places(4).named_parameters()}
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    # each place of the table is tied once, not to each place of each head
    assert sum(len(t.left) for t in found.facts.ties if t.node == "einsum") < 36 * 8 + 2 * 8 + 8


STAY = {
    "bcc->bc": "takes a diagonal",
    "bct->bt": "sums over the channels of one operand alone",
}


@pytest.mark.parametrize("equation", STAY)
def test_what_cannot_follow_stays(equation: str) -> None:
    model, x = Sample(lambda m, x: torch.einsum(equation, x), dims=1, flat=True,
                      reads=8 if equation == "bcc->bc" else 4).make()  # fmt: skip
    x = torch.randn(2, 3, 8, dtype=torch.float64) if equation == "bcc->bc" else x
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups == ()
    assert STAY[equation] in {r.name: r.reason for r in result.report.refusals}["producer"]


class Split(nn.Module):
    """ResNeSt's split attention: two halves of the channels are added up, weighed, and added up again."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.conv, self.norm = nn.Conv2d(3, 2 * n, 3), nn.BatchNorm2d(2 * n)
        self.a, self.b, self.out = nn.Conv2d(n, 6, 1), nn.Conv2d(6, 2 * n, 1), nn.Conv2d(n, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = x.reshape(2, 2, self.n, 6, 6)
        weights = self.b(torch.relu(self.a(x.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(2, 2, self.n, 1, 1).softmax(1)
        return self.out((x * weights).sum(dim=1))


@pytest.mark.parametrize("heads", ["width", "whole"])
def test_a_sum_over_blocks_ties_them(heads: str) -> None:
    model, x = randomised(Split(8)).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = plain_merge(model, x, heads=heads, keep={"a": 1.0})
    smaller = {n: p.shape for n, p in result.module.named_parameters()}
    assert smaller == {n: p.shape for n, p in Split(4).named_parameters()}
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10


class Standardised(nn.Module):
    """GroupNorm by hand: the mean of what is inside of each block."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, n, 3), nn.Conv2d(n, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = x.reshape(2, 4, -1, 6, 6)
        return self.out(torch.relu(y - y.mean(2, keepdim=True)).flatten(1, 2))


@pytest.mark.parametrize("heads", ["width", "whole"])
def test_a_mean_inside_of_blocks_is_a_mixer(heads: str) -> None:
    model, x = randomised(Standardised(16)).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = plain_merge(model, x, heads=heads)
    found = result.analysis
    assert [(g.channels, len(g.mixers)) for g in found.groups] == [(16 if heads == "width" else 4, 1)]
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    assert fxmerge.merge(model, x, ratio=0.0).report.verdict.error == 0
    if heads == "whole":  # exact: what is left is what the others left out would give
        kept = torch.cat([torch.arange(4 * b, 4 * b + 4) for b in result.plan.groups[0].kept])
        smaller = Standardised(8).double()
        smaller.conv.load_state_dict({n: v[kept] for n, v in model.conv.state_dict().items()})
        smaller.out.load_state_dict({"weight": model.out.weight[:, kept], "bias": model.out.bias})
        with torch.no_grad():
            y = smaller.conv(x).reshape(2, 2, 4, 6, 6)
            y = smaller.out(torch.relu(y - y.mean(2, keepdim=True)).flatten(1, 2))
            assert compare.difference([y], [result.module(x)]) < 1e-10
