"""The picture and the networkx graph agree with what the model computes and with its groups."""

from __future__ import annotations

import io
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.analysis.group_graph import graphml
from fxmerge.report.picture.build import draw
from fxmerge.report.picture.frames import MANY, nested, open_frames, overview
from fxmerge.report.picture.records import Picture, colours, members
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(found: fxmerge.Analysis, plan: fxmerge.Plan | None = None) -> Picture:
    return draw(found.captured, found.facts, found.grouping, found.refusals, plan)


def ends(p: Picture) -> set[tuple[str, str]]:
    label = {b.id: b.label for b in p.boxes}
    return {(label[a.source], label[a.target]) for a in p.arrows}


def test_a_residual_net_by_hand() -> None:
    model, x = NETS["residual"]()
    p = drawn(fxmerge.analyze(model, x))
    assert [b.label for b in p.boxes] == ["x", "stem · n", "a · an", "b · bn", "add", "fc", "output"]
    assert ends(p) == {
        ("x", "stem · n"), ("stem · n", "a · an"), ("a · an", "b · bn"), ("b · bn", "add"), ("stem · n", "add"),
        ("add", "fc"), ("fc", "output"),
    }  # fmt: skip
    assert [s.name for s in p.shades] == ["stem", "a"]
    assert [s.shared for s in p.shades] == [True, False]
    through = {(a.source, a.target): a for a in p.arrows}
    assert through["stem", "a"].through == ("relu",)
    assert through["add", "fc"].through == ("relu", "mean")
    assert through["stem", "a"].groups == through["add", "fc"].groups == (0,)
    assert through["a", "b"].groups == (1,)
    assert through["x", "stem"].groups == ()
    boxes = {b.label: b for b in p.boxes}
    assert set(boxes["b · bn"].roles) == {(0, "producer"), (0, "per_channel_param"), (1, "consumer")}
    assert boxes["add"].roles == ((0, "tie"),)
    assert [p.refusals[r].reason for r in boxes["fc"].refused] == [found.reason for found in p.refusals]
    assert boxes["a · an"].modules == ("a", "an")


@pytest.mark.parametrize("name", NETS)
def test_arrows_are_the_graph_and_roles_are_the_groups(name: str) -> None:
    """Every member of every group is in one box, and an arrow joins two boxes only if the fx graph has a path."""
    model, x = NETS[name]()
    found = fxmerge.analyze(model, x)
    p = drawn(found)
    home = {node: b for b in p.boxes for node in b.nodes}
    for number, g in enumerate(found.groups):
        for role, nodes in members(g).items():
            for node in nodes:
                if role in ("producer", "per_channel_param", "consumer"):
                    assert (number, role) in home[node].roles
    users: nx.DiGraph[str] = nx.DiGraph()
    for node in found.captured.module.graph.nodes:
        users.add_node(node.name)
        users.add_edges_from((used.name, node.name) for used in node.all_input_nodes)
    order = {b.id: number for number, b in enumerate(p.boxes)}
    for a in p.arrows:
        assert order[a.source] < order[a.target]
        ways = [nx.has_path(users, s, t) for s in boxed(p, a.source) for t in boxed(p, a.target)]
        assert any(ways) or name == "in_place", a  # fx has no edge for the effect of an in-place update
    told: nx.DiGraph[str] = nx.DiGraph((a.source, a.target) for a in p.arrows)
    for b in p.boxes:  # there are arrows to a layer from all layers that its data comes from
        for other in p.boxes:
            way = b.id in told and other.id in told and nx.has_path(told, b.id, other.id)
            if nx.has_path(users, b.nodes[0], other.nodes[0]) and other.kind == b.kind == "producer":
                assert way, (b.label, other.label)


def boxed(p: Picture, name: str) -> tuple[str, ...]:
    return next(b.nodes for b in p.boxes if b.id == name)


@pytest.mark.parametrize("name", NETS)
def test_widths_are_those_of_the_merged_module(name: str) -> None:
    model, x = NETS[name]()
    result = plain_merge(model, x, ratio=0.5)
    p = drawn(result.analysis, result.plan)
    checked = 0
    for b in p.boxes:
        if b.kind == "producer" and b.modules[0] in dict(result.module.named_modules()):
            before, after = (m.get_submodule(b.modules[0]) for m in (model, result.module))
            size = "out_features" if isinstance(after, nn.Linear) else "out_channels"
            if isinstance(after, nn.Linear | nn.modules.conv._ConvNd) and b.op.split()[0] != "embedding":
                assert (b.before, b.after) == (getattr(before, size), getattr(after, size)), b.label
                checked += 1
    assert checked or name not in ("residual", "mlp", "chain_2d", "dense")
    assert {s.name: s.kept for s in p.shades if s.kept < s.channels} == {
        g.name: len(g.kept) for g in result.plan.groups
    }


class Ladder(nn.Module):
    """A dense block: every concat contains the inputs of the previous one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4 * k, 4, 1) for k in (1, 1, 2, 3))
        self.fc = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        c = self.c(torch.cat([a, b], 1))
        d = self.d(torch.cat([a, b, c], 1))
        return self.fc(torch.cat([a, b, c, d], 1))  # type: ignore[no-any-return]


def test_concats_make_a_ladder() -> None:
    p = drawn(fxmerge.analyze(Ladder(), torch.randn(1, 4, 2, 2)))
    assert ends(p) == {
        ("x", "a"), ("a", "b"), ("a", "cat"), ("b", "cat"), ("cat", "c"), ("cat", "cat_1"), ("c", "cat_1"),
        ("cat_1", "d"), ("cat_1", "cat_2"), ("d", "cat_2"), ("cat_2", "fc"), ("fc", "output"),
    }  # fmt: skip
    carried = {(a.source, a.target): a.groups for a in p.arrows}
    assert carried["cat", "cat_1"] == (0, 1)
    assert carried["cat_1", "cat_2"] == (0, 1, 2)
    assert {b.label for b in p.boxes if b.kind == "concat"} == {"cat", "cat_1", "cat_2"}


class Branching(nn.Module):
    """Two parts with code between them that depends on a tensor's value, so that it cannot be traced, only recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.two = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.three = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        z = self.two(y if float(y.sum()) < 1e9 else -y)
        w = z + self.three(x)
        return w * 2 + z * w  # type: ignore[no-any-return]


def test_code_between_the_parts_of_a_recorded_model_is_one_box() -> None:
    found = fxmerge.analyze(Branching(), torch.randn(1, 3, 4, 4))
    assert found.captured.recorded is not None
    p = drawn(found)
    assert p.title == "Branching"
    labels = [b.label for b in p.boxes]
    assert labels[1:] == ["0", "2", "0", "2", "three", "code", "output"]
    assert len(p.boxes[6].nodes) > 1
    assert {(a.source, a.target) for a in p.arrows if p.boxes[6].id in (a.source, a.target)} == {
        (p.boxes[at].id, p.boxes[6].id) for at in (4, 5)
    } | {(p.boxes[6].id, p.boxes[7].id)}


def test_refused_groups_tell_why() -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5, scope="internal")
    p = drawn(result.analysis, result.plan)
    assert {s.name: bool(s.refused) for s in p.shades} == {"stem": True, "a": False}
    assert "excluded by scope" in p.shades[0].refused


def test_frames_follow_paths() -> None:
    places, frames = nested(["", "a", "a", "a.b", "a.b", "c.d", "c.d.e", "f.g", "f.g"])
    assert [(f.id, f.label, f.parent) for f in frames] == [
        ("a", "a", ""), ("c.d", "c.d", ""), ("f.g", "f.g", ""), ("a.b", "b", "a"),
    ]  # fmt: skip
    assert places == [
        ("", ""), ("a", ""), ("a", ""), ("a.b", ""), ("a.b", ""), ("c.d", ""), ("c.d", "e."), ("f.g", ""), ("f.g", ""),
    ]  # fmt: skip
    assert all(f.opened for f in frames)


@pytest.mark.parametrize("count", [MANY, MANY + 1, 10_000])
def test_no_frame_holds_very_many(count: int) -> None:
    places, frames = nested([""] * count)
    inside = [f for f, _ in places] + [f.parent for f in frames]
    assert max(inside.count(f) for f in {"", *(f.id for f in frames)}) <= MANY
    assert len({f.id for f in frames}) == len(frames)
    assert (len(frames) > 0) == (count > MANY)
    assert not count > 9_999 or not any(f.opened for f in frames if f.parent)


def test_frames_open_by_whole_levels() -> None:
    homes = ["a"] * 5 + ["a.b"] * 5 + ["c"] * 5
    _, frames = nested(homes)
    assert open_frames(frames, homes, 1) == frozenset()
    assert open_frames(frames, homes, 10) == frozenset()  # 5 + 1 + 5 would be visible
    assert open_frames(frames, homes, 11) == {"a", "c"}
    assert open_frames(frames, homes, 15) == {"a", "c", "a.b"}


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_an_overview_closes_frames_and_keeps_what_they_hold() -> None:
    p = drawn(fxmerge.analyze(Deep(), torch.randn(1, 4, 2, 2)))
    small = overview(p, 25)
    assert len(p.boxes) == 2 + 9 * 3
    assert len(small.boxes) <= 25
    assert {n for b in small.boxes for n in b.nodes} == {n for b in p.boxes for n in b.nodes}
    assert {role for b in small.boxes for role in b.roles} == {role for b in p.boxes for role in b.roles}
    assert overview(p, 1000) == p
    closed = [b for b in small.boxes if b.kind == "module"]
    assert [b.label for b in closed] == [str(i) for i in range(9)]
    assert {("x", "0"), ("0", "add"), ("x", "add")} <= ends(small)


def test_colours_are_apart() -> None:
    found = colours([False] * 12)
    assert len(set(found)) == 12
    assert colours([True])[0] != found[0]


def test_the_graph_goes_through_graphml() -> None:
    model, x = NETS["residual"]()
    found = fxmerge.analyze(model, x)
    text = graphml(found.graph)
    back: Any = nx.read_graphml(io.BytesIO(text.encode()))
    assert dict(back.nodes(data=True)) == dict(found.graph.nodes(data=True))
    assert list(back.edges(data=True)) == list(found.graph.edges(data=True))
    assert text == graphml(fxmerge.analyze(model, x).graph)
    kinds = {d["kind"] for _, d in found.graph.nodes(data=True)}
    assert {"group", "refused"} < kinds
    assert found.graph.nodes["stem"] == {"kind": "group", "channels": 12, "internal": False, "mixers": 0}
    refused = next(n for n, d in found.graph.nodes(data=True) if d["kind"] == "refused")
    assert found.graph.nodes[refused]["module"] == "fc"
    assert found.graph.edges["layer:fc", refused] == {"role": "write", "channels": 5}
    assert found.graph.edges["layer:a", "a"] == {"role": "write", "channels": 16}
