"""Where the outputs of producers meet, and that channels which are closed by a product are the first to go."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge.graph.compare import difference
from fxmerge.ir.groups import Meeting
from tests.helpers.netmaking import Net, conv, plain_merge, randomised

IMAGE, TOKENS = (2, 3, 8, 8), (2, 6, 12)
Parts = dict[str, nn.Module]


def squeeze(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.o(x * torch.sigmoid(m.e(F.relu(m.s(F.adaptive_avg_pool2d(x, 1))))))


def swiglu(m: Any, x: Tensor) -> Tensor:
    return m.o(F.silu(m.g(x)) * m.a(x))


def chunked(m: Any, x: Tensor) -> Tensor:
    gate, value = m.a(x).chunk(2, -1)
    return m.o(F.gelu(gate) * value)


def glu(m: Any, x: Tensor) -> Tensor:
    return m.o(F.glu(m.a(x)))


def by_einsum(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.einsum("bnc,bc->bnc", m.a(x), torch.tanh(m.g(x.mean(1)))))


def in_residual(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x) + m.u(x) * torch.tanh(m.g(x)))


GATES: dict[str, tuple[Any, tuple[int, ...], Parts, list[str]]] = {
    "squeeze and excite": (squeeze, IMAGE, {"a": conv(3, 12, bias=False), "s": nn.Conv2d(12, 6, 1),
                           "e": nn.Conv2d(6, 12, 1), "o": nn.Conv2d(12, 3, 1)}, ["a"]),
    "SwiGLU": (swiglu, TOKENS, {"a": nn.Linear(12, 16), "g": nn.Linear(12, 16), "o": nn.Linear(16, 5)}, ["a"]),
    "SwiGLU, gate closed": (swiglu, TOKENS, {"a": nn.Linear(12, 16), "g": nn.Linear(12, 16),
                            "o": nn.Linear(16, 5)}, ["g"]),
    "by einsum": (by_einsum, TOKENS, {"a": nn.Linear(12, 16), "g": nn.Linear(12, 16), "o": nn.Linear(16, 5)}, ["g"]),
    "added to others": (in_residual, TOKENS, {"a": nn.Linear(12, 16), "u": nn.Linear(12, 16),
                        "g": nn.Linear(12, 16), "o": nn.Linear(16, 5)}, ["a", "g"]),
}  # fmt: skip


@pytest.mark.parametrize("selection", ["l1", "l2", "gm", "reprune"])
@pytest.mark.parametrize("name", GATES)
def test_a_dead_channel_with_a_loud_gate_goes_first(name: str, selection: str) -> None:
    """Channels 1, 4 and 5 are zero by the given layers; all others of these layers, and the rest of these, are loud."""
    wiring, shape, parts, silent = GATES[name]
    net, dead = randomised(Net(wiring, **parts), 1), torch.tensor([1, 4, 5])
    with torch.no_grad():
        for layer in parts:
            held: Any = getattr(net, layer)
            if layer in silent:
                held.weight[dead] = 0
                if held.bias is not None:
                    held.bias[dead] = 0
            elif held.weight.size(0) == parts["a"].weight.size(0):  # type: ignore[union-attr,operator]
                held.weight[dead] *= 20
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    n = int(parts["a"].weight.size(0))  # type: ignore[union-attr,operator,arg-type]
    group = next(g for g in fxmerge.analyze(net, x).groups if g.channels == n and len(g.producers) > 1)
    result = plain_merge(net, x, keep={group.name: n - 3}, ratio=0.0, selection=selection, decomposition="prune")
    if selection == "reprune":  # it keeps one channel of each cluster: of the dead ones, which are one, a single one
        assert len({1, 4, 5} & {*result.plan.groups[0].kept}) == 1
        return
    assert result.plan.groups[0].kept == tuple(i for i in range(n) if i not in (1, 4, 5))
    with torch.no_grad():
        other = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1))
        assert difference([net(other)], [result.module(other)]) < 1e-6


@pytest.mark.parametrize("wiring", [glu, chunked])
def test_halves_of_one_layer_are_multiplied(wiring: Any) -> None:
    """l2 keeps the channels with the largest products of the norms of a channel's two rows, bias included."""
    net: Any = randomised(Net(wiring, a=nn.Linear(12, 24), o=nn.Linear(12, 5)), 3)
    x = torch.randn(TOKENS)
    (group,) = fxmerge.analyze(net, x).groups
    assert group.meetings == (Meeting("halves", (0,)),)
    rows = torch.cat([net.a.weight, net.a.bias[:, None]], 1)
    norms = rows.norm(dim=1)
    expected = sorted((norms[:12] * norms[12:]).argsort(descending=True)[:5].tolist())
    added = sorted(rows.unflatten(0, (2, 12)).square().sum((0, 2)).argsort(descending=True)[:5].tolist())
    assert expected != added
    result = plain_merge(net, x, keep={group.name: 5}, ratio=0.0, selection="l2")
    assert list(result.plan.groups[0].kept) == expected


def test_a_sigmoid_that_reads_nothing_does_not_close_its_channel() -> None:
    """A gate without weights gives 1/2: the channel counts for half, and is kept before one that is quieter."""
    net: Any = randomised(Net(squeeze, **GATES["squeeze and excite"][2]), 4)
    with torch.no_grad():
        net.e.weight[3] = net.e.bias[3] = 0
        net.a.weight[3] *= 100
    x = torch.randn(IMAGE)
    group = next(g for g in fxmerge.analyze(net, x).groups if len(g.producers) > 1)
    result = plain_merge(net, x, keep={group.name: 1}, ratio=0.0, selection="l2")
    assert next(p for p in result.plan.groups if p.name == group.name).kept == (3,)


class Twice(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b, self.c, self.o = how, *(nn.Linear(6, 8) for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        a, b, c = self.a(x), self.b(x), self.c(x)
        joined = {
            "add": lambda: a + b + c,
            "sub": lambda: a - b,
            "cat": lambda: torch.cat([a, b], 1),
            "stack": lambda: torch.stack([a, b]).amax(0),
            "max": lambda: torch.maximum(a, b),
            "div": lambda: a / (1 + b.exp()),
        }[self.how]()
        return self.o(joined)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("add", [("add", (0, 1)), ("add", (3, 2))]),
        ("sub", [("sub", (0, 1))]),
        ("cat", [("either", (0, 1))]),
        ("max", [("add", (0, 1))]),
        ("div", []),
    ],
)
def test_meetings_by_the_op(how: str, expected: list[Any]) -> None:
    group = fxmerge.analyze(Twice(how), torch.randn(2, 4, 6)).groups[0]
    count = len(group.producers)
    found = [(m.op, m.operands) for m in group.meetings if m.operands != tuple(range(count)) or m.op != "either"]
    if how == "cat":
        found = [(m.op, m.operands) for m in group.meetings]
    assert found == expected or (how == "div" and group.meetings[-1].op == "either")


@pytest.mark.parametrize("seed", range(3))
def test_products_and_sums_by_outer_products(seed: int) -> None:
    """(a + b) x c: rows are outer products, computed here in full."""
    from fxmerge.methods.evidence import Candidates, Term
    from fxmerge.methods.linalg import distances
    from fxmerge.methods.selection import select

    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(9, d, generator=g, dtype=torch.float64) for d in (3, 4, 5))
    terms = (Term(False, (0, 1)), Term(True, (3, 2)))
    channels = Candidates((a, b, c), torch.zeros(9, 1, 1), terms=terms)
    whole = torch.einsum("ni,nj->nij", torch.cat([a, b], 1), c).flatten(1)
    torch.testing.assert_close(channels.norms, whole.norm(dim=1))
    torch.testing.assert_close(distances(channels.rows), torch.cdist(whole, whole))
    cells = torch.zeros(9, dtype=torch.int64)
    plain = Candidates((whole,), torch.zeros(9, 1, 1))
    for name, count in itertools.product(("l1", "l2", "gm", "reprune"), (2, 5)):
        assert torch.equal(select(name, channels, cells, (count,)), select(name, plain, cells, (count,))), name
    some = torch.tensor([1, 3, 4, 8])
    torch.testing.assert_close(channels.only(some).norms, whole[some].norm(dim=1))
