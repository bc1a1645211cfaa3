"""Writes to places and reads from places: setitem in its forms, scatter with indices over the channels, gather."""

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
IDS = torch.tensor([2, 0, 2, 1])


def made(wiring: Any, *shape: int, **parts: Any) -> tuple[nn.Module, Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return randomised(Net(wiring, **copy.deepcopy(parts))).double().eval(), x


def silenced(model: nn.Module, rows: dict[str, tuple[int, ...]]) -> nn.Module:
    """A copy in which these rows of layers, and of their biases, are zero."""
    found = copy.deepcopy(model)
    for name, gone in rows.items():
        for value in found.get_submodule(name).parameters():
            value.data[list(gone)] = 0
    return found


def check(wiring: Any, expected: dict[str, tuple[str, ...]], shape: tuple[int, ...] = (4, 6), **parts: Any) -> Any:
    """The groups are as expected, {group: layers whose rows they are}; dropping channels is silencing their rows."""
    given = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "o": nn.Linear(8, 3), **parts}
    model, x = made(wiring, *shape, **given)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    found = result.analysis
    assert {p.name for p in result.plan.groups} == set(expected), [(r.name, r.reason) for r in found.refusals]
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    gone: dict[str, tuple[int, ...]] = {}
    groups = {g.name: g for g in found.groups}
    for planned in result.plan.groups:
        dropped = sorted(set(range(planned.channels)) - set(planned.kept))
        for layer in expected[planned.name]:
            member = next(m for m in groups[planned.name].producers if m.layer.module == layer)
            here, local = member.local(torch.tensor(dropped))
            assert here.all()
            gone[layer] = (*gone.get(layer, ()), *member.where[local].flatten().tolist())
    for other in (x, torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)):
        before, after = compare.outputs(silenced(model, gone), (other,)), compare.outputs(result.module, (other,))
        assert compare.difference(before, after) < 1e-10
    return result


def rows(m: Any, x: Any) -> Any:
    y = m.a(x).relu()
    y[1:3] = m.b(x)[:2].relu()
    return m.o(y)


def row(m: Any, x: Any) -> Any:
    y = m.a(x).relu()
    y[-1] = m.b(x)[0]
    y[0] += y[1]
    return m.o(y)


def number(m: Any, x: Any) -> Any:
    """A range of channels is set to zero: the literal range must follow."""
    y = m.a(x).relu()
    y[:, 2:6] = 0.0
    return m.o(y + m.b(x).relu())


def into_zeros(m: Any, x: Any) -> Any:
    y = torch.zeros(6, 8, dtype=x.dtype)
    y[:4] = m.a(x).relu()
    y[torch.tensor([4, 5])] = m.b(x)[:2].relu()
    return m.o(y)


def into_sized_zeros(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    y = h.new_zeros(h.size(0) + 1, h.size(1))
    y[:-1] = h
    return m.o(y)


def by_mask(m: Any, x: Any) -> Any:
    y = m.a(x).relu()
    y[y > 1] = 0.0
    y[x[:, 0] > 0] = m.b(x)[:1].relu()
    return m.o(y)


def in_view(m: Any, x: Any) -> Any:
    y = m.a(x).relu().clone()
    y[1:].mul_(0.5)
    y[:2].copy_(m.b(x)[:2].relu())
    y[2].zero_()
    return m.o(y)


BOTH = {"a": ("a", "b")}
WRITES: dict[str, tuple[Any, dict[str, tuple[str, ...]]]] = {
    "rows": (rows, BOTH),
    "row": (row, BOTH),
    "number": (number, {"a": ("a", "b"), "a#2": ("a", "b")}),
    "into_zeros": (into_zeros, BOTH),
    "into_sized_zeros": (into_sized_zeros, {"a": ("a",)}),
    "by_mask": (by_mask, BOTH),
    "in_view": (in_view, BOTH),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    wiring, expected = WRITES[name]
    check(wiring, expected)


@pytest.mark.parametrize("start", [0, 2])
def test_a_range_of_channels_is_written_by_others(start: int) -> None:
    """The channels at the places that are written are tied to those of the value; a range in the graph follows."""

    def part(m: Any, x: Any) -> Any:
        y = m.a(x).relu()
        y[:, start : start + 4] = m.c(x).relu()
        return m.o(y)

    result = check(part, {"a": ("a",), "a#2": ("a", "c")} if start else {"a": ("a", "c"), "a#2": ("a",)},
                   c=nn.Linear(6, 4), b=nn.Identity())  # fmt: skip
    assert result.report.after.parameters < 0.6 * result.report.before.parameters


def send(m: Any, x: Any) -> Any:
    """Messages along edges, as in graph networks: an index that is expanded over the channels."""
    h = m.a(x).relu()
    to = m.ids.view(-1, 1).expand(-1, h.size(-1))
    return m.o(torch.zeros_like(h).scatter_add(0, to, h) + m.b(x).relu())


def send_literally(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    return m.o(torch.zeros(3, 8, dtype=x.dtype).scatter_add(0, m.ids.view(-1, 1).repeat(1, 8), h))


def largest(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    to = m.ids.unsqueeze(1).expand_as(h)
    return m.o(h.new_zeros(3, h.shape[1]).scatter_reduce(0, to, h, "amax", include_self=False))


def neighbours(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    return m.o(h.gather(0, m.ids[:, None].expand(-1, 8)) + torch.take_along_dim(h, m.ids[:, None], 0))


def nearest(m: Any, x: Any) -> Any:
    """Places that each channel finds for itself."""
    h = m.a(x).relu()
    return m.o(h.gather(0, h.argsort(0)) + h.sort(0)[0].cumsum(0))


@pytest.mark.parametrize("wiring", [send, send_literally, largest, neighbours, nearest], ids=lambda w: w.__name__)
def test_places_by_index(wiring: Any) -> None:
    expected = {"a": ("a", "b")} if wiring is send else {"a": ("a",)}
    check(wiring, expected, ids=IDS)


def test_an_index_with_an_entry_of_its_own_for_each_channel() -> None:
    """A buffer, which is cut as a parameter is."""
    ids = torch.randint(4, (4, 8), generator=torch.Generator().manual_seed(0))
    result = check(lambda m, x: m.o(m.a(x).relu().gather(0, m.ids)), {"a": ("a",)}, ids=ids)
    assert result.module.get_buffer("ids").shape == (4, 4)


def over_channels(m: Any, x: Any) -> Any:
    h = m.a(x)
    return m.o(h.scatter(1, m.ids.expand(4, -1), h.relu()[:, :4]))


def some_channels(m: Any, x: Any) -> Any:
    h = m.a(x)
    return m.o(h.scatter_add(0, m.ids.view(-1, 1).expand(-1, 5), h.relu()))


def listed(m: Any, x: Any) -> Any:
    y = m.a(x)
    y[:, torch.tensor([1, 5])] = 0.5
    return m.o(y)


def table(m: Any, x: Any) -> Any:
    """Channels that a constant makes different from each other."""
    y = torch.zeros(4, 8, dtype=x.dtype)
    y[:, 3] = 1.0
    return m.o(m.a(x) + y)


def sorted_channels(m: Any, x: Any) -> Any:
    return m.o(m.a(x).sort(1)[0])


STAY: dict[str, tuple[Any, str]] = {
    "over_channels": (over_channels, "runs over the axis of the channels"),
    "some_channels": (some_channels, "takes only some of the channels"),
    "listed": (listed, "runs over the axis of the channels"),
    "table": (table, "sizes at select cannot follow"),
    "sorted_channels": (sorted_channels, "runs along the channels"),
    "topk": (lambda m, x: m.o(F.pad(m.a(x).topk(6, 1)[0], (0, 2))), "runs along the channels"),
    "fft": (lambda m, x: m.o(torch.fft.fft(m.a(x)).real), "transforms the channels"),
    "argmax": (lambda m, x: m.o(m.a(x) * m.a(x).argmax(1, keepdim=True)), "gives the numbers of channels"),
}


@pytest.mark.parametrize("name", STAY)
def test_what_must_stay(name: str) -> None:
    wiring, reason = STAY[name]
    model, x = made(wiring, 4, 6, a=nn.Linear(6, 8), o=nn.Linear(8, 3), ids=IDS)
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups == ()
    refused = {r.name: r for r in result.report.refusals}
    assert reason in refused["a"].reason
    assert ".py:" in refused["a"].where
    assert torch.equal(result.module(x), model(x))


def test_a_parameter_is_written_to_a_place() -> None:
    """A learned token in place of some rows."""

    def masked(m: Any, x: Any) -> Any:
        y = m.a(x)
        y[1:3] = m.token
        return m.o(y.relu())

    model, x = made(masked, 4, 6, a=nn.Linear(6, 8), o=nn.Linear(8, 3), token=raw(8))
    result = plain_merge(model, x, ratio=0.5)
    found = result.analysis
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("a", 4)]
    assert result.module.get_parameter("token").shape == (4,)
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    assert found.groups[0].scale_blocks


@pytest.mark.parametrize("apart", [0.0, 3.0])
def test_a_function_of_a_channel_and_a_parameter(apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """x ** p is not linear in x: copies of a channel carry each other exactly if their exponents are equal."""
    model, x = made(
        lambda m, x: m.o((m.a(x).sigmoid() + 1) ** m.p), 16, 6, a=nn.Linear(6, 8), o=nn.Linear(8, 3), p=raw(8)
    )
    a, exponent = model.get_submodule("a"), model.get_parameter("p")
    with torch.no_grad():
        for value in a.parameters():
            value[4:] = value[:4]
        exponent[4:] = exponent[:4] + apart
    monkeypatch.setitem(fxmerge.SELECTORS, "first", lambda channels, count: torch.arange(count))
    result = plain_merge(model, x, ratio=0.5, decomposition="mostsim", selection="first")
    plan = result.plan.groups[0]
    exact = [p.cosine > 1 - 1e-9 and abs(p.into - p.channel) == 4 for p in plan.partners]
    assert all(exact) if apart == 0 else not any(exact)
    if apart == 0:
        with torch.no_grad():
            assert compare.difference([model(x)], [result.module(x)]) < 1e-10
