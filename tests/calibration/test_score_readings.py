"""Queries and keys are chosen by what the scores lose on the rows, whatever the norms of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear

import fxmerge
from fxmerge.calibration.paired_run import Settings
from fxmerge.calibration.readings import readings
from fxmerge.methods.elimination import curve, eliminate
from tests.helpers.netmaking import Net, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEADS, USELESS = 8, 4, (1, 4, 6)


def heads(x: Tensor, width: int = WIDTH) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def sdpa(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))
    return m.o(y.transpose(1, 2).flatten(2))


def grouped(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), enable_gqa=True)
    return m.o(y.transpose(1, 2).flatten(2))


def folded(m: Any, x: Tensor) -> Tensor:
    """Samples and heads on one axis, scores without a softmax."""
    q, k, v = (heads(layer(x)).flatten(0, 1) for layer in (m.q, m.k, m.v))
    y = torch.sigmoid(torch.bmm(q, k.transpose(1, 2)) / 4) @ v
    return m.o(y.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2))


def turned(m: Any, x: Tensor) -> Tensor:
    def rotated(t: Tensor) -> Tensor:
        cos, sin = (table.expand(-1, t.size(1), -1, -1) for table in (m.angles.cos(), m.angles.sin()))
        return cos * t + sin * torch.cat([-t[..., WIDTH // 2 :], t[..., : WIDTH // 2]], -1)

    q, k = rotated(heads(m.q(x))), rotated(heads(m.k(x))).repeat_interleave(2, 1)
    w = (q @ k.transpose(2, 3)).softmax(-1)
    return m.o((w @ heads(m.v(x)).repeat_interleave(2, 1)).transpose(1, 2).flatten(2))


# forward function, number of key-value heads
NETS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "sdpa": (sdpa, 4), "grouped": (grouped, 2), "folded": (folded, 4), "turned": (turned, 2)
}  # fmt: skip


def made(name: str, useless: tuple[int, ...] = ()) -> tuple[nn.Module, Tensor]:
    """A net and data of six directions in a space of 16. Useless channels have large rows; their keys read the rest."""
    torch.manual_seed(0)
    forward, served = NETS[name]
    angles = torch.arange(5)[:, None] * torch.linspace(0.1, 1, WIDTH // 2)
    more = {"angles": angles.repeat(1, 2)[None, None]} if name == "turned" else {}
    net: Any = Net(forward, q=Linear(16, HEADS * WIDTH), k=Linear(16, served * WIDTH, bias=False),
                   v=Linear(16, served * WIDTH), o=Linear(HEADS * WIDTH, 16), **more)  # fmt: skip
    basis = torch.linalg.qr(torch.randn(16, 16))[0]
    with torch.no_grad():
        for weight, rows in ((net.q.weight, HEADS), (net.k.weight, served)):
            weight *= 2
            weight.view(rows, WIDTH, 16)[:, list(useless)] *= 5
        net.k.weight.view(served, WIDTH, 16)[:, list(useless)] @= basis[:, 6:] @ basis[:, 6:].T
    return net.eval(), torch.randn(24, 5, 6) @ basis[:, :6].T


def scores(net: Any, x: Tensor, name: str, without: list[int] | None = None) -> Tensor:
    """The scores of all pairs, about their mean over the keys where they go through a softmax."""
    seen = {}
    hooks = [layer.register_forward_hook(lambda _, __, y, at=at: seen.update({at: y})) for at, layer in
             (("q", net.q), ("k", net.k))]  # fmt: skip
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    q, k = (heads(seen[at].double()) for at in "qk")
    k = k.repeat_interleave(HEADS // k.size(1), 1)
    if without is not None:
        q = q.clone()
        q[..., without] = 0
    found = q @ k.mT
    return found if name == "folded" else found - found.mean(-1, keepdim=True)


@pytest.mark.parametrize("name", ["sdpa", "grouped", "folded"])
def test_the_loss_is_that_of_the_scores(name: str) -> None:
    """Cut by hand and computed over all pairs of positions."""
    net, x = made(name)
    found = fxmerge.analyze(net, x[:2])
    group = next(g for g in found.groups if g.name == "q")
    assert not group.consumers
    settings = Settings(rows=1000, seed=0, held=False, reduce=lambda t: t)
    (reading,) = readings(found.captured, found.facts, found.grouping, [group], [[x[:16]], [x[16:]]], settings)["q"]
    whole = float(scores(net, x, name).square().sum())
    row = found.facts.params["q.weight"].axes[0].view(HEADS, WIDTH)  # labels
    for dropped in ([0], [2, 5], [1, 3, 4, 7]):
        atoms = set(found.grouping.atom[row[:, dropped]].flatten().tolist())
        channels = [c for c, atom in enumerate(group.atoms.tolist()) if atom in atoms]
        gone = torch.zeros(len(reading.gram), dtype=torch.float64)
        gone[reading.columns[torch.isin(reading.channels, torch.tensor(channels))].flatten()] = 1
        lost = float((scores(net, x, name) - scores(net, x, name, dropped)).square().sum()) / whole
        assert float(gone @ reading.gram @ gone / reading.gram.sum()) == pytest.approx(lost, rel=1e-4)
        inside = torch.tensor(channels)
        kept = eliminate((reading,), inside, len(channels) // 2)
        left = [c for at, c in enumerate(channels) if at not in kept.tolist()]
        gone = torch.zeros_like(gone).index_fill_(0, torch.tensor(left), 1)
        assert float(curve((reading,), inside, 1)[len(channels) // 2]) == pytest.approx(
            float(gone @ reading.gram @ gone / reading.gram.sum()), rel=1e-6
        )


@pytest.mark.parametrize("name", NETS)
def test_channels_that_no_score_needs_are_dropped(name: str) -> None:
    useless = (1, 5, 2, 6) if name == "turned" else USELESS  # with their partners in the rotation
    net, x = made(name, useless)
    q: Any = net.q
    norms = q.weight.view(HEADS, WIDTH, 16).norm(dim=-1)
    assert norms[:, list(useless)].min() > 2 * norms[:, [c for c in range(WIDTH) if c not in useless]].max()
    share = 1 - len(useless) / WIDTH
    result = fxmerge.merge(net, x[:2], keep={"q": share, "v": 1.0}, calibration=[x], new_biases=False)
    (plan,) = result.plan.groups
    group = next(g for g in result.analysis.groups if g.name == "q")
    rows = result.analysis.facts.params["q.weight"].axes[0].view(HEADS, WIDTH)
    dropped = set(range(group.channels)) - set(plan.kept)
    atoms = set(group.atoms[list(dropped)].tolist())
    of_row = result.analysis.grouping.atom[rows]
    places = {at for at in range(WIDTH) if not atoms.isdisjoint(of_row[:, at].tolist())}
    assert places == set(useless)
    with torch.no_grad():
        assert torch.allclose(result.module(x), net(x), atol=1e-4)
    pruned = fxmerge.merge(net, x[:2], keep={"q": share, "v": 1.0}, selection="l2", calibration=[x])
    with torch.no_grad():
        assert (pruned.module(x) - net(x)).norm() > 0.05 * net(x).norm()


def test_a_budget_takes_them_first() -> None:
    """12 of the 64 numbers in the cache are useless, and all of these are keys."""
    net, x = made("sdpa", USELESS)
    result = fxmerge.merge(net, x[:2], budget={"cache": 52 / 64}, calibration=[x])
    assert {g.name: len(g.kept) for g in result.plan.groups} == {"q": 20}
