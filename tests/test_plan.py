"""The plan: out to JSON and back, and replayed on other weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import DECOMPOSITIONS, SELECTORS, FxMergeError, Options, Plan
from fxmerge.plan import GroupPlan, Partner
from tests.helpers.netmaking import plain_merge


class Net(nn.Module):
    """Two groups: conv1, and conv2 whose channels a grouped convolution reads in two cells."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.bn1 = nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 12, 1)
        self.conv3 = nn.Conv2d(12, 4, 3, groups=2)
        self.fc = nn.Linear(4, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.conv3(x).mean((2, 3)))


X = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def kept(result: fxmerge.Result) -> dict[str, tuple[int, ...]]:
    return {g.name: g.kept for g in result.plan.groups}


@pytest.mark.parametrize("fields", [
    *({"selection": s, "decomposition": d} for s, d in zip(SELECTORS, itertools.cycle(DECOMPOSITIONS), strict=False)),
    {"ratio": 0.25, "keep": {"conv1": 3, "conv?": 0.5}, "ignore": ["fc"], "seed": 5, "round_to": 2},
    {"ratio": 0.0},
    {"mostsim_scale": "reference", "scope": "internal"},
], ids=repr)  # fmt: skip
def test_json_and_back_is_equal(fields: dict[str, Any]) -> None:
    plan = plain_merge(Net(0), X, **fields).plan
    back = Plan.from_json(plan.json())
    assert back == plan
    assert back.json() == plan.json()
    assert json.loads(plan.json())["fxmerge_plan"] == 1


def test_what_a_plan_says() -> None:
    """Every dropped channel is named once; it goes to a kept one of its own cell, or nowhere."""
    result = plain_merge(Net(0), X, ratio=0.5)
    assert {g.name: (g.channels, len(g.kept)) for g in result.plan.groups}.items() >= {
        "conv1": (8, 4), "conv2": (12, 6)
    }.items()  # fmt: skip
    for g in result.plan.groups:
        assert sorted([*g.kept, *(p.channel for p in g.partners)]) == list(range(g.channels))
        assert all(p.into in g.kept if p.into >= 0 else p.scale == 0 for p in g.partners)
        assert all(-1 <= p.cosine <= 1 + 1e-9 for p in g.partners)
    (cells,) = (g for g in result.plan.groups if g.name == "conv2")
    assert sum(k < 6 for k in cells.kept) == 3
    assert all((p.into < 6) == (p.channel < 6) for p in cells.partners if p.into >= 0)
    assert result.module.conv1.out_channels == 4


def test_similarity_by_hand() -> None:
    assert GroupPlan("a", 2, (0, 1)).similarity == 1
    assert GroupPlan("a", 3, (0,), (Partner(1, 0, 2.0, 0.5), Partner(2, -1, 0.0, 0.0))).similarity == 0.25


def plan_text(change: Callable[[dict[str, Any]], Any]) -> str:
    """A small good plan as JSON, changed."""
    groups = (GroupPlan("conv1", 4, (0, 2), (Partner(1, 0, 1.5, 0.9), Partner(3, -1, 0.0, 0.0))),)
    data = json.loads(Plan(Options(), groups).json())
    changed = change(data)
    return json.dumps(data if changed is None else changed)


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda d: [d],
    "a number": lambda d: 5,
    "a string": lambda d: "plan",
    "an empty object": lambda d: {},
    "no version": lambda d: d.pop("fxmerge_plan") and None,
    "another version": lambda d: d.update(fxmerge_plan=2),
    "no options": lambda d: d.pop("options") and None,
    "options a list": lambda d: d.update(options=[1]),
    "options null": lambda d: d.update(options=None),
    "an unknown option": lambda d: d["options"].update(rate=1),
    "a bad option": lambda d: d["options"].update(ratio=2),
    "no groups": lambda d: d.pop("groups") and None,
    "groups a number": lambda d: d.update(groups=3),
    "groups null": lambda d: d.update(groups=None),
    "a group that is a string": lambda d: d.update(groups=["conv1"]),
    "a group without a name": lambda d: d["groups"][0].pop("name") and None,
    "no kept": lambda d: d["groups"][0].pop("kept") and None,
    "none kept": lambda d: d["groups"][0].update(kept=[]),
    "kept twice": lambda d: d["groups"][0].update(kept=[0, 0]),
    "kept out of order": lambda d: d["groups"][0].update(kept=[2, 0]),
    "kept too large": lambda d: d["groups"][0].update(kept=[0, 4]),
    "kept negative": lambda d: d["groups"][0].update(kept=[-1, 2]),
    "kept text": lambda d: d["groups"][0].update(kept=["first"]),
    "kept null": lambda d: d["groups"][0].update(kept=[None]),
    "kept no list": lambda d: d["groups"][0].update(kept=2),
    "channels text": lambda d: d["groups"][0].update(channels="four"),
    "channels null": lambda d: d["groups"][0].update(channels=None),
    "partners a number": lambda d: d["groups"][0].update(partners=3),
    "a partner short of a field": lambda d: d["groups"][0]["partners"][0].pop("scale") and None,
    "a partner with one more": lambda d: d["groups"][0]["partners"][0].update(more=1),
    "a partner that is a list": lambda d: d["groups"][0].update(partners=[[1, 0, 1.5, 0.9]]),
}


def test_the_undamaged_plan_is_read() -> None:
    assert Plan.from_json(plan_text(lambda d: None)).groups[0].kept == (0, 2)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_plans_are_refused(case: str) -> None:
    with pytest.raises(FxMergeError, match=r"plan|ratio|rate"):
        Plan.from_json(plan_text(DAMAGED[case]))


@pytest.mark.parametrize("text", ["", "{", "not json", '{"fxmerge_plan": 1', "null", "[]", "NaN"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FxMergeError, match="not a plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_apply_keeps_the_same_channels_on_other_weights(decomposition: str) -> None:
    first = plain_merge(Net(0), X, decomposition=decomposition, ratio=0.5)
    other = Net(1)
    assert kept(plain_merge(other, X, ratio=0.5)) != kept(first)  # its own choice would be another
    before = copy.deepcopy(other.state_dict())
    replayed = fxmerge.apply(Plan.from_json(first.plan.json()), other, X)
    assert kept(replayed) == kept(first)
    assert replayed.plan.options == first.plan.options
    shapes = [(n, p.shape) for n, p in first.module.named_parameters()]
    assert [(n, p.shape) for n, p in replayed.module.named_parameters()] == shapes
    if decomposition != "fold":  # a producer's rows are the other model's own
        torch.testing.assert_close(replayed.module.conv1.weight, other.conv1.weight[list(kept(first)["conv1"])])
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_apply_to_the_same_weights_is_the_same_model() -> None:
    first = plain_merge(Net(0), X, ratio=0.5, selection="random", seed=4)
    again = fxmerge.apply(first.plan, Net(0), X)
    assert torch.equal(first.module(X), again.module(X))
    assert again.plan == first.plan


@functools.cache
def half() -> Plan:
    return plain_merge(Net(0), X, ratio=0.5).plan


def without(name: str) -> Plan:
    """A plan that leaves out one group."""
    plan = half()
    return dataclasses.replace(plan, groups=tuple(g for g in plan.groups if g.name != name))


def test_a_group_that_the_plan_leaves_out_stays_whole() -> None:
    module = fxmerge.apply(without("conv2"), Net(1), X).module
    assert (module.conv1.out_channels, module.conv2.out_channels) == (4, 12)


def test_a_plan_of_no_group_changes_nothing() -> None:
    net = Net(1)
    nothing = Plan(Options(ratio=0.5), ())
    result = fxmerge.apply(nothing, net, X)
    assert result.plan.groups == ()
    assert torch.equal(result.module(X), net(X))


@pytest.mark.parametrize("model", [
    Net(0, width=10),  # conv1 has 10 channels
    nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)),  # no conv1 at all
    nn.Sequential(nn.Conv2d(2, 3, 3)),  # no group
])  # fmt: skip
def test_a_plan_for_another_model_is_refused(model: nn.Module) -> None:
    plan = half()
    with pytest.raises(FxMergeError, match="conv1"):
        fxmerge.apply(plan, model.eval(), X)


def test_a_plan_that_keeps_unequal_cells_is_refused() -> None:
    """The grouped convolution's two cells of conv2 must keep equally many."""
    plan = half()
    groups = tuple(
        dataclasses.replace(g, kept=(0, 1, 2, 3, 6, 7), partners=()) if g.name == "conv2" else g for g in plan.groups
    )
    with pytest.raises(FxMergeError, match="conv2"):
        fxmerge.apply(dataclasses.replace(plan, groups=groups), Net(0), X)
