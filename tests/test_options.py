"""Options: what is nonsense is refused by name, what is good passes; how many channels a group keeps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from fxmerge import ALLOCATORS, DECOMPOSITIONS, PROBES, SELECTORS, FxMergeError, Options
from fxmerge.analysis.feasible import rounded
from fxmerge.ir.groups import Group
from fxmerge.planning.counts import by_ratio
from tests.helpers.netmaking import plain_merge

NAN, INF = math.nan, math.inf

NONSENSE: dict[str, list[Any]] = {
    "ratio": [-0.1, 1, 1.0, 1.5, NAN, INF, "a", True, None, [0.5]],
    "budget": [{"flop": 0.5}, {"flops": 0}, {"flops": 0.0}, {"flops": 1.1}, {"flops": -0.5}, {"flops": NAN},
               {"flops": "a"},
               {"flops": True}, {"flops": None}, {"flops": 0.5, "params": 0.5}, {5: 0.5}, 0.5, "flops", None,
               [("flops", 0.5)]],
    "of": [5, None, (5,), ["a", None], "", ("",), {"a": 1}],
    "allocation": ["magic", "", None, 0],
    "max_ratio": [0, 0.0, -0.1, 1, 1.5, NAN, "a", True, None],
    "threshold": [-1.1, 1.1, NAN, "a", False, None],
    "lam": [-0.1, 1.1, NAN, "a", True, None],
    "round_to": [0, -1, 1.5, "8", True, None, NAN],
    "depth": [1, 0, "yes", None],
    "experts": [0, 0.0, -0.1, 1.5, 2, NAN, INF, "a", True, None],
    "same_widths": [1, 0, "yes", None],
    "own_class": [1, 0, "yes", None],
    "new_biases": [1, 0, "no", None],
    "memory": [-1, "1", None, float("inf"), float("nan"), True],
    "seed": [-1, 0.5, "0", False, None],
    "scope": ["some", "", None, 1, ["all"]],
    "heads": ["some", "", None, 1],
    "selection": ["l3", "L2", "", None, 2],
    "decomposition": ["magic", "", None, 0],
    "mostsim_scale": ["inexact", "", None],
    "refit": ["some", "", None, True],
    "probes": ["grey", "", None, 0],
    "samples": [-1, 1.5, "8", True, None],
    "batch": [0, -1, 1.5, "8", True, None],
    "rows": [0, -1, 1.5, "8", True, None],
    "keep": [{"*": 0}, {"*": -1}, {"*": 1.5}, {"*": NAN}, {"*": 0.0}, {"*": "4"}, {"*": True}, {"*": None}, {5: 4},
             4, "a", None, [("*", 4)]],
    "ignore": ["conv1", "", 5, None, (5,)],
}  # fmt: skip

GOOD: dict[str, list[Any]] = {
    "ratio": [0, 0.0, 0.5, 0.999],
    "budget": [{}, {"flops": 0.5}, {"params": 1}, {"latency": 1e-3}],
    "of": [(), ("layers.*",), ["a", "b*"]],
    "allocation": list(ALLOCATORS),
    "max_ratio": [0.01, 0.9, 0.999],
    "threshold": [-1, 0, 0.45, 1],
    "lam": [0, 0.7, 1],
    "round_to": [1, 8, 64],
    "depth": [True, False],
    "experts": [0.01, 0.5, 1, 1.0],
    "same_widths": [True, False],
    "own_class": [True, False],
    "new_biases": [True, False],
    "memory": [0, 0.5, 8],
    "seed": [0, 7, 2**31],
    "scope": ["internal", "all"],
    "heads": ["width", "whole"],
    "selection": list(SELECTORS),
    "decomposition": list(DECOMPOSITIONS),
    "mostsim_scale": ["exact", "reference"],
    "refit": ["none", "synthetic", "calibration"],
    "probes": ["auto", *PROBES],
    "samples": [0, 1, 500],
    "batch": [1, 64],
    "rows": [1, 10**6],
    "keep": [{}, {"conv*": 4}, {"*": 0.5, "a": 1, "b": 1.0}],
    "ignore": [(), ("conv1",), ["a", "b*"]],
}


def test_every_field_has_cases() -> None:
    names = {f.name for f in dataclasses.fields(Options)}
    assert set(NONSENSE) == names
    assert set(GOOD) == names


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in NONSENSE.items() for v in values], ids=repr)
def test_nonsense_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(FxMergeError, match=name):
        Options(**{name: value})
    with pytest.raises(FxMergeError, match=name):
        Options().replace(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values], ids=repr)
def test_good_values_pass(name: str, value: Any) -> None:
    found = getattr(Options(**{name: value}), name)
    assert found == (tuple(value) if name in ("ignore", "of") else value)
    changed = Options(threshold=0.25, seed=3).replace(**{name: value})
    assert getattr(changed, name) == found
    for other in dataclasses.fields(Options):
        if other.name not in (name, "threshold", "seed"):
            assert getattr(changed, other.name) == getattr(Options(), other.name)


def test_unknown_options_are_refused_and_the_known_are_listed() -> None:
    model, x = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 2)
    for ask in (lambda: Options().replace(rate=0.5), lambda: plain_merge(model, x, rate=0.5)):
        with pytest.raises(FxMergeError, match="rate") as caught:
            ask()
        assert all(f.name in str(caught.value) for f in dataclasses.fields(Options))
    with pytest.raises(FxMergeError, match="dict"):
        plain_merge(model, x, {"ratio": 0.5})  # type: ignore[arg-type]


def test_a_ratio_and_a_budget_contradict_each_other() -> None:
    for ask in (
        lambda: Options(ratio=0.5, budget={"flops": 0.5}),
        lambda: Options(ratio=0.3).replace(budget={"flops": 0.5}),
        lambda: Options(budget={"flops": 0.5}).replace(ratio=0.3),
    ):
        with pytest.raises(FxMergeError, match=r"ratio .* and budget .* contradict"):
            ask()
    options = Options(seed=1).replace(budget={"flops": 0.5}).replace(seed=2)
    assert options.budget == {"flops": 0.5}
    assert Options(budget={"flops": 0.5}).replace(budget={}, ratio=0.3).ratio == 0.3
    assert Options().ratio == 0.5


def test_options_are_frozen_and_replace_copies() -> None:
    keep = {"a": 1}
    options = Options(keep=keep)
    keep["b"] = 2
    assert options.keep == {"a": 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.ratio = 0.1  # type: ignore[misc]
    assert options.replace(ratio=0.1).ratio == 0.1
    assert options.ratio == 0.5


# keep, size, cells, round_to, what one cell keeps
ROUNDED = [
    (5.0, 10, 1, 1, 5), (0.2, 10, 1, 1, 1), (10.0, 10, 1, 1, 10), (3.4, 10, 1, 1, 3), (3.6, 10, 1, 1, 4),
    (10 * (1 - 0.7), 10, 1, 1, 3),  # 3.0000000000000004
    (32.0, 64, 1, 8, 32), (30.0, 64, 1, 8, 32), (27.0, 64, 1, 8, 24), (1.0, 64, 1, 8, 8), (64.0, 64, 1, 8, 64),
    (3.0, 6, 1, 8, 6),  # too small for a multiple: as it is
    (5.1, 10, 4, 8, 6), (4.9, 10, 4, 8, 4),  # 4 cells: each a multiple of 2
    (5.0, 10, 8, 8, 5), (5.0, 10, 16, 8, 5),  # the cells are a multiple already
    (4.0, 12, 3, 8, 8), (3.0, 12, 3, 8, 8),  # 3 cells: each a multiple of 8, at least 8
    (5.1, 12, 6, 4, 6), (5.0, 12, 6, 9, 6),  # steps of 2 and of 3
]  # fmt: skip


@pytest.mark.parametrize(("keep", "size", "cells", "round_to", "expected"), ROUNDED)
def test_rounded_by_hand(keep: float, size: int, cells: int, round_to: int, expected: int) -> None:
    assert rounded(keep, size, cells, round_to) == expected


@pytest.mark.parametrize("round_to", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("cells", [1, 2, 3, 4, 8])
def test_rounded_is_a_multiple_or_all(round_to: int, cells: int) -> None:
    for size in range(1, 40):
        for share in (0.01, 0.3, 0.5, 0.77, 1.0):
            found = rounded(size * share, size, cells, round_to)
            assert 1 <= found <= size
            assert found == size or found * cells % round_to == 0
            below = max(m for m in range(size + 1) if m * cells % round_to == 0)
            if share < 1 and found < below:  # no multiple is nearer
                near = [m for m in range(1, size + 1) if m * cells % round_to == 0]
                assert abs(found - size * share) <= min(abs(m - size * share) for m in near) + 1e-9


Blocks = tuple[tuple[tuple[int, ...], ...], ...]


def a_group(name: str, sizes: list[int], blocks: Blocks = ()) -> Group:
    """A group of cells of these sizes, interleaved; each row of a block is a tuple of cells."""
    owner = torch.cat([torch.full((s,), c) for c, s in enumerate(sizes)])
    owner = owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(0))]
    return Group(
        name=name, atoms=torch.arange(len(owner)), cells=owner, producers=(), per_channel_params=(), consumers=(),
        mixers=(), ties=(), internal=True, scale_blocks=(), blocks=blocks,
    )  # fmt: skip


FOUR = (((0,), (1,), (2,), (3,)),)
GROUPS = [
    a_group("stem", [10]), a_group("block.0.conv1", [16]), a_group("block.1.conv1", [8] * 4, FOUR), a_group("tiny", [1])
]  # fmt: skip

# options, what one cell of each group keeps
UNIFORM: list[tuple[dict[str, Any], list[int]]] = [
    ({"ratio": 0}, [10, 16, 8, 1]),
    ({"ratio": 0.5}, [5, 8, 4, 1]),
    ({"ratio": 0.75}, [2, 4, 2, 1]),  # 2.5 may be 2 or 3, tiny keeps 1
    ({"ratio": 0.999}, [1, 1, 1, 1]),
    ({"ratio": 0.5, "keep": {"stem": 7}}, [7, 8, 4, 1]),
    ({"ratio": 0.5, "keep": {"block.*": 8}}, [5, 8, 2, 1]),
    ({"ratio": 0.5, "keep": {"block.*": 0.25}}, [5, 4, 2, 1]),
    ({"ratio": 0.5, "keep": {"block.0.*": 3, "block.*": 16, "*": 1}}, [1, 3, 4, 1]),  # the first that matches wins
    ({"ratio": 0.5, "keep": {"*": 1.0}}, [10, 16, 8, 1]),
    ({"ratio": 0.5, "keep": {"stem": 10}}, [10, 8, 4, 1]),
    ({"ratio": 0.5, "keep": {"stem": 1}}, [1, 8, 4, 1]),  # one channel, not a share of 1
    ({"ratio": 0.5, "round_to": 8}, [8, 8, 4, 1]),
    ({"ratio": 0.5, "round_to": 8, "keep": {"stem": 7}}, [7, 8, 4, 1]),  # a number is a number
]


@pytest.mark.parametrize(("fields", "expected"), UNIFORM)
def test_allocation_by_hand(fields: dict[str, Any], expected: list[int]) -> None:
    counts = by_ratio(GROUPS, Options(**fields), {})
    assert [len(c) for c in counts.values()] == [1, 1, 4, 1]
    assert all(len(set(c)) == 1 for c in counts.values())
    found = {group: c[0] for group, c in counts.items()}
    if fields.get("ratio") == 0.75:
        assert found.pop("stem") in (2, 3)
        expected = expected[1:]
    assert list(found.values()) == expected


@pytest.mark.parametrize(("keep", "group"), [
    ({"stem": 11}, "stem"),
    ({"block.*": 17}, "block.0.conv1"),
    ({"block.1.*": 6}, "block.1.conv1"),  # 4 cells cannot share 6
    ({"block.1.*": 2}, "block.1.conv1"),
    ({"*": 2}, "block.1.conv1"),
])  # fmt: skip
def test_what_keep_cannot_have_names_the_group(keep: dict[str, int], group: str) -> None:
    with pytest.raises(FxMergeError, match=group):
        by_ratio(GROUPS, Options(keep=keep), {})


# sizes of the cells, and blocks: cells that were shuffled across several blocks
UNEQUAL: list[tuple[list[int], Blocks]] = [
    ([2, 2, 4], (((0, 1), (2,)),)),
    ([3, 5, 4, 4], (((0, 1), (2, 3)),)),
    ([1, 3, 3, 1], (((0, 1), (2, 3)), ((0, 2), (1, 3)))),
    ([2, 4, 4, 2], (((0, 1), (2, 3)), ((0, 2), (1, 3)))),
]


@pytest.mark.parametrize(("sizes", "blocks"), UNEQUAL)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("round_to", [1, 2, 4])
def test_unequal_cells_are_as_near_to_the_share_as_any(
    sizes: list[int], blocks: Blocks, ratio: float, round_to: int
) -> None:
    """Every row of a block keeps equally many, in all a multiple; no other numbers are nearer: all are tried."""

    def off(counts: tuple[int, ...]) -> float:
        return sum(abs(k - n * (1 - ratio)) for k, n in zip(counts, sizes, strict=True))

    def allowed(counts: tuple[int, ...]) -> bool:
        rows = all(len({sum(counts[c] for c in row) for row in block}) == 1 for block in blocks)
        return rows and sum(counts) % round_to == 0

    (found,) = by_ratio([a_group("a", sizes, blocks)], Options(ratio=ratio, round_to=round_to), {}).values()
    assert all(1 <= k <= n for k, n in zip(found, sizes, strict=True))
    assert allowed(found)
    tried = itertools.product(*(range(1, n + 1) for n in sizes))
    assert off(found) == pytest.approx(min(off(t) for t in tried if allowed(t)), abs=1e-9)


class Net(nn.Module):
    """Two groups, first and second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize(("fields", "widths"), [
    ({}, (4, 3)),
    ({"keep": {"first": 5}}, (5, 3)),
    ({"keep": {"s*": 1.0}}, (4, 6)),
    ({"keep": {"*": 2}}, (2, 2)),
    ({"ignore": ("first",)}, (8, 3)),  # the second group is written by `second` and read by `last`
    ({"ratio": 0}, (8, 6)),
    ({"round_to": 4}, (4, 4)),
])  # fmt: skip
def test_merged_widths(fields: dict[str, Any], widths: tuple[int, int]) -> None:
    found = plain_merge(Net(), torch.randn(2, 3), **fields).module
    assert (found.first.out_features, found.second.out_features) == widths
    assert (found.second.in_features, found.last.in_features) == widths


@pytest.mark.parametrize("field", ["keep", "ignore"])
def test_a_pattern_that_matches_nothing_lists_the_groups(field: str) -> None:
    value: Any = {"fist": 2} if field == "keep" else ("fist",)
    with pytest.raises(FxMergeError, match="fist") as caught:
        plain_merge(Net(), torch.randn(2, 3), **{field: value})
    assert "first" in str(caught.value)
    assert "second" in str(caught.value)


def test_keep_too_many_names_the_group() -> None:
    with pytest.raises(FxMergeError, match="second"):
        plain_merge(Net(), torch.randn(2, 3), keep={"second": 7})


@pytest.mark.parametrize(("changes", "message"), [
    ({"budget": {"params": 0.5}, "of": ("a",)}, "depth drops branches of the whole model"),
    ({"budget": {"cache": 0.5}}, "depth cannot be priced by the key-value cache"),
])  # fmt: skip
def test_depth_is_refused_where_it_is_not_priced(changes: Any, message: str) -> None:
    with pytest.raises(FxMergeError, match=message):
        Options(depth=True, **changes)
