"""Constant folding: values computed from parameters alone become parameters, so that layers can be merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import verify
from fxmerge.capture.capture_model import capture
from fxmerge.capture.torch_export import export
from fxmerge.graph import compare
from tests.helpers.netmaking import Net, one_thread, plain_merge, randomised, raw  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES, IMAGE = (4, 6), (2, 3, 6, 6)


def made(wiring: Any, shape: tuple[int, ...] = FEATURES, **parts: Any) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(0)
    net = randomised(Net(wiring, **copy.deepcopy(parts))).double().eval()
    return net, torch.randn(shape, generator=generator, dtype=torch.float64)


def names(model: nn.Module, x: Tensor) -> dict[str, nn.Parameter]:
    return dict(capture(model, x).module.named_parameters())


def checked(model: nn.Module, x: Tensor, **widths: int) -> fxmerge.Result:
    """The merge of a model; checks the folded graph's outputs, the permutation oracle, and the kept `widths`."""
    result = plain_merge(model, x, ratio=0.5)
    found = result.analysis
    folded = found.captured.module
    assert compare.difference(compare.outputs(model, (x,)), compare.outputs(folded, (x,))) < 1e-14
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    assert {p.name: len(p.kept) for p in result.plan.groups} == widths
    return result


def cat_bias(m: Any, x: Tensor) -> Tensor:
    """The packed projection of Swin v2: q and v have a bias, k has none."""
    q, k, v = F.linear(x, m.w, torch.cat([m.q, torch.zeros_like(m.v), m.v])).chunk(3, -1)
    return m.out(F.relu(q) * F.relu(k) + F.relu(v))


def test_a_bias_that_is_joined_from_pieces() -> None:
    model, x = made(cat_bias, w=raw(24, 6), q=raw(8), v=raw(8), out=nn.Linear(8, 3))
    result = checked(model, x, w=4)
    assert set(names(model, x)) == {"w", "q_folded", "out.weight", "out.bias"}
    held = dict(result.module.named_parameters())
    assert held["q_folded"].shape == (12,)
    assert held["w"].shape == (12, 6)
    assert held["q_folded"][4:8].abs().max() == 0  # k still has no bias


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (w - mean) / (std + 1e-5), self.bias, padding=1)


def test_a_standardised_weight() -> None:
    model, x = made(lambda m, x: m.b(F.relu(m.a(x))), IMAGE, a=Standardised(3, 8, 3), b=Standardised(8, 2, 3))
    checked(model, x, **{"a.weight_folded": 4})
    assert set(names(model, x)) == {"a.weight_folded", "a.bias", "b.weight_folded", "b.bias"}


def test_one_plus_a_weight() -> None:
    model, x = made(lambda m, x: m.b(F.relu(m.a(x) * (1 + m.g))), a=nn.Linear(6, 8), g=raw(8), b=nn.Linear(8, 2))
    before = model.g.detach().clone()  # type: ignore[operator, union-attr]
    checked(model, x, a=4)
    held = names(model, x)
    assert torch.equal(held["g_folded"], 1 + before)
    assert "g" not in held
    assert torch.equal(model.g, before)  # type: ignore[arg-type]


def test_views_stay_views() -> None:
    """A raw parameter that is only reshaped keeps its name; its labels are followed through the view."""
    for view in (lambda g: g.view(1, -1, 1, 1), lambda g: g[:, None, None], lambda g: g.view(g.shape[0], 1, 1)):
        model, x = made(
            lambda m, x, v=view: m.b(m.a(x) * v(m.g)), IMAGE, a=nn.Conv2d(3, 8, 3), g=raw(8), b=nn.Conv2d(8, 2, 1)
        )
        result = checked(model, x, a=4)
        assert "g" in names(model, x)
        assert dict(result.module.named_parameters())["g"].shape == (4,)


def table(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x) + m.rows[m.ids] + F.embedding(m.ids, m.words)))


def test_tables_stay_tables() -> None:
    """Lookups in a table are not folded, whether by indexing or by F.embedding."""
    ids = torch.tensor([0, 2, 2, 1])
    model, x = made(table, a=nn.Linear(6, 8), rows=raw(3, 8), words=raw(5, 8), ids=ids, b=nn.Linear(8, 2))
    checked(model, x, a=4)
    assert {"rows", "words"} <= set(names(model, x))


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("places", [lambda ids: ids.long(), lambda ids: ids + 1, lambda ids: (ids * 2).clamp(max=4)])
def test_a_table_that_is_read_at_computed_places_stays_one(places: Any, exported: bool) -> None:
    """Arithmetic on the places is not arithmetic on the table, which keeps the rows that this input does not read."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x) + F.embedding(places(m.ids), m.words)))

    ids = torch.tensor([0, 2, 2, 1], dtype=torch.int32)
    model, x = made(wiring, a=nn.Linear(6, 8), words=raw(30, 8), ids=ids, b=nn.Linear(8, 2))
    if not exported:
        result = checked(model, x, a=4)
        assert dict(result.module.named_parameters())["words"].shape == (30, 4)
        return
    held = dict(export(model, (x,), {}).named_parameters())
    assert held["words"].shape == (30, 8)


def test_a_table_that_is_computed_is_folded() -> None:
    ids = torch.tensor([0, 2, 2, 1])

    def wiring(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x) + F.embedding(m.ids, m.words * 2)))

    model, x = made(wiring, a=nn.Linear(6, 8), words=raw(5, 8), ids=ids, b=nn.Linear(8, 2))
    checked(model, x, a=4)
    assert "words_folded" in names(model, x) and "words" not in names(model, x)


def test_what_would_grow_stays_computed() -> None:
    """An outer product is larger than its two vectors, so it is not folded."""
    model, x = made(lambda m, x: m.a(x) + (m.u[:, None] * m.v).sum(), a=nn.Linear(6, 8), u=raw(20), v=raw(20))
    assert {"u_folded"} == set(names(model, x)) - {"a.weight", "a.bias"}  # the sum is a single number
    model, x = made(lambda m, x: x + m.u[:, None] * m.v, u=raw(4), v=raw(6))
    assert set(names(model, x)) == {"u", "v"}


@pytest.mark.parametrize("trained", [True, False])
def test_what_was_frozen_stays_frozen(trained: bool) -> None:
    model, x = made(lambda m, x: m.b(F.relu(F.linear(x, m.w * 2))), w=raw(8, 6), b=nn.Linear(8, 2))
    model.w.requires_grad_(trained)  # type: ignore[union-attr, operator]
    folded = names(model, x)["w_folded"]
    assert folded.requires_grad is trained
    assert folded.is_leaf
    assert model.w.grad is None


class Frozen(nn.Module):
    """A norm whose parameters and statistics are buffers, as in torchvision's FrozenBatchNorm2d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.var + 1e-5).rsqrt()
        shift = self.bias - self.mean * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


def test_buffers_alone_are_not_made_parameters() -> None:
    wiring = lambda m, x: m.b(F.relu(m.n(m.a(x))))  # noqa: E731
    model, x = made(wiring, IMAGE, a=nn.Conv2d(3, 8, 3), n=Frozen(8), b=nn.Conv2d(8, 2, 1))
    for form in (model, export(model, (x,), {})):
        assert set(names(form, x)) == {"a.weight", "a.bias", "b.weight", "b.bias"}
        result = checked(form, x, a=4)
        assert [tuple(b.shape) for b in result.module.buffers() if b.numel() > 1] == [(4, 1, 1)] * 2


class Shared(nn.Module):
    """A standardised convolution that is called twice, and a weight that is used both as it is and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice = nn.Conv2d(3, 8, 3), Standardised(8, 8, 3)
        self.w, self.out = raw(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(F.relu(self.a(x))))).mean((2, 3))
        out: Tensor = self.out(F.relu(F.linear(F.relu(F.linear(x, self.w)), self.w * 0.5)))
        return out


def test_one_parameter_for_one_value() -> None:
    model, (_, x) = randomised(Shared()).double().eval(), made(cat_bias, IMAGE)
    held = names(model, x)
    shapes = {name: tuple(value.shape) for name, value in held.items() if "folded" in name}
    assert shapes == {"twice.weight_folded": (8, 8, 3, 3), "w_folded": (8, 8)}
    assert "w" in held
    assert "twice.weight" not in held
    checked(model, x, a=4, w=4, w_folded=4)


def test_a_layer_that_is_called_keeps_its_weight() -> None:
    """Another layer uses the folded weight; the module still uses its own."""
    wiring = lambda m, x: m.b(F.relu(m.a(x)) + F.relu(F.linear(x, m.a.weight * 2)))  # noqa: E731
    model, x = made(wiring, a=nn.Linear(6, 8), b=nn.Linear(8, 2))
    assert {"a.weight", "a.weight_folded"} <= set(names(model, x))
    checked(model, x, a=4)


def test_a_name_that_is_taken() -> None:
    model, x = made(lambda m, x: F.linear(x, m.w * 2) + m.w_folded, w=raw(8, 6), w_folded=raw(8))
    assert set(names(model, x)) == {"w_folded_", "w_folded"}


def test_updates_in_place_are_not_lost() -> None:
    """Folding keeps in-place calls on activations, even if their result is not used."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y.mul_(m.g)
        return m.b(F.relu(F.linear(y, m.w * 2)))

    model, x = made(wiring, a=nn.Linear(6, 8), g=raw(8), w=raw(10, 8), b=nn.Linear(10, 2))
    checked(model, x, a=4, w_folded=5)


def test_a_parameter_that_forward_writes_is_not_folded() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        m.w.clamp_(min=-0.1)
        return m.b(F.relu(F.linear(x, m.w * 2)))

    model, x = made(wiring, w=raw(8, 6), b=nn.Linear(8, 2))
    assert "w_folded" not in names(model, x)
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups == ()
    assert result.report.verdict.error == 0


def zeroed_part(m: Any, x: Tensor) -> Tensor:
    """The packed bias of torchvision's Swin v2: the part of the keys is zeroed in a copy."""
    bias = m.bias.clone()
    bias[8:16].zero_()
    q, k, v = F.linear(x, m.w, bias).chunk(3, -1)
    return m.out(F.relu(q) * F.relu(k) + F.relu(v))


@pytest.mark.parametrize("exported", [False, True])
def test_a_copy_that_is_written_in_place(exported: bool) -> None:
    model, x = made(zeroed_part, w=raw(24, 6), bias=raw(24), out=nn.Linear(8, 3))
    before = model.bias.detach().clone()
    if exported:
        result = fxmerge.merge(torch.export.export(model, (x,)), ratio=0.5, decomposition="prune", refit="none")
    else:
        result = checked(model, x, w=4)
    assert [len(p.kept) for p in result.plan.groups] == [4]
    held = dict(result.module.named_parameters())["bias_folded"]
    assert held.shape == (12,) and held[4:8].abs().max() == 0 and held[:4].abs().min() > 0
    assert torch.equal(model.bias, before)


def test_a_copy_that_is_written_twice_and_read_through_a_view() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        weight = m.w.clone()
        part = weight[:4]
        part.mul_(2)
        weight.add_(1)
        return m.b(F.relu(torch.cat([F.linear(x, weight), F.linear(x, part)], -1)))

    model, x = made(wiring, w=raw(8, 6), b=nn.Linear(12, 2))
    folded = capture(model, x).module
    assert not any("mul_" in str(n.target) or "add_" in str(n.target) for n in folded.graph.nodes)
    assert compare.difference(compare.outputs(model, (x,)), compare.outputs(folded, (x,))) < 1e-14


def read_before(m: Any, x: Tensor) -> Tensor:
    weight = m.w * 2
    y = F.linear(x, weight)
    weight.add_(1)
    return m.b(F.relu(y + F.linear(x, weight)))


def random_each_time(m: Any, x: Tensor) -> Tensor:
    weight = m.w * 2
    weight[0].bernoulli_(0.5)
    return m.b(F.relu(F.linear(x, weight)))


@pytest.mark.parametrize("wiring", [read_before, random_each_time])
def test_what_is_not_the_same_at_all_reads_is_not_folded(wiring: Any) -> None:
    model, x = made(wiring, w=raw(8, 6), b=nn.Linear(8, 2))
    assert "w_folded" not in names(model, x)
