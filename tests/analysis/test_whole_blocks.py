"""heads="whole": whole blocks of channels leave, and what is left is the net that one makes by hand with fewer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
import tests.helpers.attention_by_others  # noqa: F401
from fxmerge import Options, Plan, verify
from fxmerge.graph import compare
from fxmerge.plan import GroupPlan
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.prices import check_prices
from tests.helpers.written_by_others import made

pytestmark = pytest.mark.usefixtures("one_thread")

ByBlock = dict[str, tuple[int, int]]  # parameter -> (the axis of the blocks, how many rows of blocks it has)
SIZE, SIDE = 4, 6  # channels of a head or a group; tokens


class Blocked(nn.Module):
    """Layers around something that has `blocks` blocks, which stand in the parameters of `by_block`."""

    by_block: ClassVar[ByBlock]
    example = (2, SIDE, 5)

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks


class Attention(Blocked):
    """Packed projection, one row of blocks for queries, keys and values each; scaled by the width of a head."""

    by_block: ClassVar[ByBlock] = {"qkv.weight": (0, 3), "qkv.bias": (0, 3), "proj.weight": (1, 1)}

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.qkv, self.proj, self.out = nn.Linear(5, 3 * blocks * SIZE), nn.Linear(blocks * SIZE, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.blocks, SIZE).permute(2, 0, 3, 1, 4)
        return self.out(F.relu(self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, t, -1))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Biased(Attention):
    """A bias of the scores for each head, and a mask that all heads share."""

    by_block: ClassVar[ByBlock] = Attention.by_block | {"bias": (0, 1)}

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.bias = nn.Parameter(torch.zeros(blocks, SIDE, SIDE))
        self.register_buffer("mask", torch.ones(1, 1, SIDE, SIDE).tril() == 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * SIZE**-0.5 + self.bias
        return scores.masked_fill(self.mask, -math.inf).softmax(-1) @ v


class Normed(Attention):
    """Queries and keys normalised by weights that all heads share."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.a, self.b = nn.LayerNorm(SIZE), nn.RMSNorm(SIZE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.a(q), self.b(k), v)


class Rotated(Attention):
    """Rotary positions from tables of one head's width."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        angles = torch.arange(SIDE)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return x * self.cos + torch.cat([-other, one], -1) * self.sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)


class Linearised(Attention):
    """Linear attention: keys meet values first, and the two spread over each other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


class Table(Attention):
    """T5's: a mask from a table of a number for each head."""

    by_block: ClassVar[ByBlock] = Attention.by_block | {"table.weight": (1, 1)}

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.table = nn.Embedding(SIDE, blocks)
        self.register_buffer("apart", (torch.arange(SIDE)[:, None] - torch.arange(SIDE)).abs())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.table(self.apart).permute(2, 0, 1)[None])


class GroupedQueries(Blocked):
    """Two query heads for each key head, which leave together."""

    by_block: ClassVar[ByBlock] = {"q.weight": (0, 1), "q.bias": (0, 1), "kv.weight": (0, 2), "kv.bias": (0, 2),
                                   "proj.weight": (1, 1)}  # fmt: skip

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.q, self.kv = nn.Linear(5, 2 * blocks * SIZE), nn.Linear(5, 2 * blocks * SIZE)
        self.proj, self.out = nn.Linear(2 * blocks * SIZE, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2 * self.blocks, SIZE).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        k, v = (p.view(b, t, self.blocks, SIZE).transpose(1, 2) for p in (k, v))
        k, v = (p[:, :, None].expand(b, self.blocks, 2, t, SIZE).reshape(b, -1, t, SIZE) for p in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(F.relu(self.proj(y.transpose(1, 2).flatten(2))))


class OneKey(Blocked):
    """One key head for all query heads: it stays."""

    by_block: ClassVar[ByBlock] = {"q.weight": (0, 1), "q.bias": (0, 1), "v.weight": (0, 1), "v.bias": (0, 1),
                                   "proj.weight": (1, 1)}  # fmt: skip

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.q, self.k, self.v = nn.Linear(5, blocks * SIZE), nn.Linear(5, SIZE), nn.Linear(5, blocks * SIZE)
        self.proj, self.out = nn.Linear(blocks * SIZE, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (p(x).unflatten(-1, (self.blocks, SIZE)).transpose(1, 2) for p in (self.q, self.v))
        y = (q @ self.k(x)[:, None].transpose(-2, -1)).softmax(-1) @ v
        return self.out(F.relu(self.proj(y.transpose(1, 2).flatten(2))))


class GroupedConv(Blocked):
    """A ResNeXt's block: what goes into a group of the convolution leaves with what comes out of it."""

    by_block: ClassVar[ByBlock] = {"a.weight": (0, 1), "a.bias": (0, 1), "g.weight": (0, 1), "n.weight": (0, 1),
                                   "n.bias": (0, 1), "n.running_mean": (0, 1), "n.running_var": (0, 1),
                                   "c.weight": (1, 1)}  # fmt: skip
    example = (2, 3, 8, 8)

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.a, self.n = nn.Conv2d(3, blocks * SIZE, 1), nn.BatchNorm2d(blocks * SIZE)
        self.g = nn.Conv2d(blocks * SIZE, blocks * SIZE, 3, padding=1, groups=blocks, bias=False)
        self.c, self.out = nn.Conv2d(blocks * SIZE, 7, 1), nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.c(F.relu(self.n(self.g(F.relu(self.a(x))))))))


class GroupedFunction(GroupedConv):
    """The same, with the function: its number of groups is an argument."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.relu(self.a(x)), self.g.weight, None, 1, 1, 1, self.blocks)
        return self.out(F.relu(self.c(F.relu(self.n(y)))))


class GroupNormed(Blocked):
    """GroupNorm, twice: as a module and as a function. Whole groups leave without disturbing the others."""

    by_block: ClassVar[ByBlock] = {"a.weight": (0, 1), "a.bias": (0, 1), "n.weight": (0, 1), "n.bias": (0, 1),
                                   "w": (0, 1), "c.weight": (1, 1)}  # fmt: skip
    example = (2, 3, 8, 8)

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.a, self.n = nn.Conv2d(3, blocks * SIZE, 1), nn.GroupNorm(blocks, blocks * SIZE)
        self.w = nn.Parameter(torch.ones(blocks * SIZE))
        self.c, self.out = nn.Conv2d(blocks * SIZE, 7, 1), nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(F.relu(self.n(self.a(x))), self.blocks, self.w)
        return self.out(F.relu(self.c(F.relu(y))))


WHOLE = [Attention, Biased, Normed, Rotated, Linearised, Table, GroupedQueries, OneKey, GroupedConv, GroupedFunction,
         GroupNormed]  # fmt: skip
every_whole = pytest.mark.parametrize("cls", WHOLE, ids=lambda c: c.__name__)


def built(cls: Callable[[int], nn.Module], blocks: int = 4) -> tuple[Any, Tensor]:
    model = randomised(cls(blocks)).double().eval()
    return model, torch.randn(*model.example, dtype=torch.float64, generator=torch.Generator().manual_seed(1))  # type: ignore[misc]


def by_hand(model: Any, kept: list[int]) -> nn.Module:
    """The same net with some of its blocks."""
    smaller = type(model)(len(kept)).double().eval()
    state = {}
    for name, value in model.state_dict().items():
        if name in model.by_block:
            axis, copies = model.by_block[name]
            split = value.unflatten(axis, (copies, model.blocks, -1))
            value = split.index_select(axis + 1, torch.tensor(kept)).flatten(axis, axis + 2)
        state[name] = value
    smaller.load_state_dict(state)
    return smaller


def importance(model: Any) -> Tensor:
    """The sum of squares of all that writes a block's channels, by block."""
    total = torch.zeros(model.blocks, dtype=torch.float64)
    for name, (axis, copies) in model.by_block.items():
        layer, _, slot = name.rpartition(".")
        bias_counts = slot == "bias" and not hasattr(model, "n")  # behind a norm it does not
        if axis == 0 and layer not in ("n", "") and (slot == "weight" or bias_counts):
            rows = model.state_dict()[name].unflatten(0, (copies, model.blocks, -1))
            total += rows.movedim(1, 0).flatten(1).square().sum(1)
    return total


def of_blocks(result: fxmerge.Result) -> Any:
    found = [p for p in result.plan.groups if p.channels == 4]
    assert len(found) == 1
    return found[0]


@every_whole
def test_is_the_net_made_by_hand(cls: Any) -> None:
    model, x = built(cls)
    found = fxmerge.analyze(model, x, heads="whole")
    name = next(g.name for g in found.groups if g.channels == 4)
    others = {g.name: 1.0 for g in found.groups if g.name != name}
    result = plain_merge(model, x, heads="whole", keep={name: 2} | others, ratio=0.0, selection="l2")
    kept = list(of_blocks(result).kept)
    if cls is not GroupNormed:
        assert kept == importance(model).topk(2).indices.sort().values.tolist()
    expected = by_hand(model, kept)
    for inputs in (x, x[:1] * 0.5):
        with torch.no_grad():
            assert compare.difference([expected(inputs)], [result.module(inputs)]) < 1e-10
    sizes = [{n: p.shape for n, p in m.named_parameters()} for m in (result.module, expected)]
    assert sizes[0] == sizes[1]


@every_whole
def test_permutation(cls: Any) -> None:
    """Whole blocks change places."""
    found = fxmerge.analyze(*built(cls), heads="whole")
    moved = verify.permutation(found.captured, found.facts, found.grouping)
    assert max(moved.values()) < 1e-10
    assert not any(g.blocks for g in found.groups)


@pytest.mark.parametrize("decomposition", ["mostsim", "fold", "lstsq", "prune"])
@pytest.mark.parametrize("selection", ["l1", "gm", "reprune", "reprune-kernel", "random"])
def test_every_method_takes_blocks(decomposition: str, selection: str) -> None:
    for cls in (Attention, GroupedConv):
        result = plain_merge(*built(cls), heads="whole", decomposition=decomposition, selection=selection)
        assert len(of_blocks(result).kept) == 2
        assert result.report.verdict.error < math.inf


def refitted_and_not(cls: Any, **options: Any) -> tuple[float, float]:
    """Errors on samples that refit has not seen: with refit, and without."""
    model, x = built(cls)
    torch.manual_seed(0)
    fresh, *batches = (torch.randn(count, *x.shape[1:], dtype=torch.float64) for count in (256, 16, 16, 16))

    def error(**how: Any) -> float:
        merged = fxmerge.merge(model, x, **options, **how).module
        with torch.no_grad():
            return compare.difference([model(fresh)], [merged(fresh)])

    return error(calibration=batches), error(refit="none")


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["l2", "repair"])
@every_whole
def test_refit_repairs_them(cls: Any, selection: str) -> None:
    refitted, not_refitted = refitted_and_not(cls, heads="whole", selection=selection)
    assert refitted < 0.92 * not_refitted


@pytest.mark.parametrize("heads", ["width", "whole", "both"])
@pytest.mark.parametrize("cls", [GroupedQueries, Normed], ids=lambda c: c.__name__)
def test_a_plan_is_replayed(cls: Any, heads: str) -> None:
    model, x = built(cls)
    result = plain_merge(model, x, heads=heads)
    again = fxmerge.apply(result.plan, model, x)
    assert [p.kept for p in again.plan.groups] == [p.kept for p in result.plan.groups]
    with torch.no_grad():
        assert torch.equal(again.module(x), result.module(x))


@pytest.mark.parametrize("cls", [Attention, Biased, GroupedQueries, GroupedConv], ids=lambda c: c.__name__)
def test_heads_and_then_width(cls: Any) -> None:
    """A merged model is merged once more: fewer blocks, and each of them narrower."""
    model, x = built(cls)
    whole = plain_merge(model, x, heads="whole").module
    both = plain_merge(whole, x, heads="width")
    found = both.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, whole, both.module)]
    assert sizes[2] < 0.8 * sizes[1] < 0.6 * sizes[0]


def rows(group: Any) -> dict[tuple[str, int], int]:
    """{(a producer's weight, its row): the channel}."""
    return {
        (w.layer.params["weight"], row): channel
        for w in group.producers
        for channel, where in zip(w.channels.tolist(), w.where.tolist(), strict=True)
        for row in where
    }


def narrowed_by_hand(model: Any, x: Tensor, result: fxmerge.Result) -> tuple[list[int], nn.Module]:
    """Some of the blocks are taken by hand; of what is left, those channels stay that the plan keeps."""
    (heads,) = (list(p.kept) for p in result.plan.groups if p.name.endswith("#whole"))
    fewer = by_hand(model, heads)
    before, after = ({g.name: g for g in f.groups} for f in (result.analysis, fxmerge.analyze(fewer, x)))
    groups = []
    for p in result.plan.groups:
        if p.name not in after:
            continue
        there, kept = rows(after[p.name]), set()
        for (path, row), channel in rows(before[p.name]).items():
            axis, copies = model.by_block.get(path, (1, 1))
            if axis == 0:
                size = len(model.get_parameter(path)) // copies // model.blocks
                copy, block, inner = row // size // model.blocks, row // size % model.blocks, row % size
                row = (copy * len(heads) + heads.index(block)) * size + inner if block in heads else -1
            if channel in p.kept and row >= 0:
                kept.add(there[path, row])
        groups.append(GroupPlan(p.name, after[p.name].channels, tuple(sorted(kept))))
    options = Options(scope="all", decomposition="prune", refit="none")
    return heads, fxmerge.apply(Plan(options, tuple(groups)), fewer, x).module


@every_whole
def test_both_is_fewer_and_narrower_made_by_hand(cls: Any) -> None:
    model, x = built(cls)
    result = plain_merge(model, x, heads="both", ratio=0.75, decomposition="prune", selection="l2")
    heads, expected = narrowed_by_hand(model, x, result)
    assert len(heads) == (1 if cls is Linearised else 2)  # whose heads have no width to lose
    with torch.no_grad():
        assert compare.difference([expected(x)], [result.module(x)]) < 1e-10
    sizes = [{n: p.shape for n, p in m.named_parameters()} for m in (result.module, expected)]
    assert sizes[0] == sizes[1]
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    again = fxmerge.apply(Plan.from_json(result.plan.json()), model, x)
    with torch.no_grad():
        assert torch.equal(again.module(x), result.module(x))


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize("cls", [Attention, GroupedQueries, GroupedConv], ids=lambda c: c.__name__)
def test_both_leave_together_what_the_ratio_says(cls: Any, ratio: float) -> None:
    model, x = built(cls, 8)
    result = plain_merge(model, x, heads="both", ratio=ratio, decomposition="prune")
    inner = result.module.get_parameter("c.weight" if cls is GroupedConv else "proj.weight")
    whole = model.get_parameter("c.weight" if cls is GroupedConv else "proj.weight")
    assert abs(inner.size(1) / whole.size(1) - (1 - ratio)) < 0.13  # 8 blocks of 4 channels are coarse
    (heads,) = (p for p in result.plan.groups if p.name.endswith("#whole"))
    assert len(heads.kept) == round(8 * math.sqrt(1 - ratio)) and inner.size(1) < whole.size(1) * len(heads.kept) / 8
    assert "kept channels in blocks that remain: " in result.report.text(200)
    assert {s.name: s.kept for s in result.report.picture.shades}[heads.name] == len(heads.kept)
    assert heads.name in result.report.html() and heads.name in result.analysis.graph


@pytest.mark.parametrize("decomposition", ["mostsim", "fold", "lstsq"])
@pytest.mark.parametrize("cls", [Attention, Rotated, GroupedConv], ids=lambda c: c.__name__)
def test_both_by_every_method_with_refit(cls: Any, decomposition: str) -> None:
    refitted, not_refitted = refitted_and_not(cls, heads="both", decomposition=decomposition)
    assert refitted < 0.92 * not_refitted


@pytest.mark.parametrize("heads", ["whole", "both"])
@pytest.mark.parametrize("cls", [GroupedConv, GroupedFunction, GroupNormed], ids=lambda c: c.__name__)
def test_fewer_groups_fit_into_the_users_class(cls: Any, heads: str, tmp_path: Path) -> None:
    """A layer keeps its number of groups as an attribute, which no tensor tells."""
    model, x = built(cls)
    result = plain_merge(model, x, heads=heads, decomposition="prune")
    result.save(tmp_path / "saved")
    own = fxmerge.load(tmp_path / "saved", model=model)
    assert type(own) is cls
    with torch.no_grad():
        assert compare.difference([result.module(x)], [own(x)]) < 1e-10
    for name, layer in own.named_modules():
        if isinstance(layer, nn.Conv2d):
            merged = result.module.get_submodule(name) if name != "g" or cls is GroupedConv else layer
            assert repr(layer) == repr(merged) and layer.in_channels == layer.weight.size(1) * layer.groups


def test_keep_and_ignore_name_blocks_and_widths_apart() -> None:
    model, x = built(Attention)
    result = plain_merge(model, x, heads="both", ratio=0.0, keep={"qkv#whole": 3, "qkv": 0.5})
    kept = {p.name: len(p.kept) for p in result.plan.groups}
    assert kept == {"qkv#whole": 3, "qkv": 16}
    result = plain_merge(model, x, heads="both", ignore=("qkv#whole",))
    assert not any(p.name.endswith("#whole") for p in result.plan.groups)
    assert {p.name: len(p.kept) for p in result.plan.groups}["qkv"] == 16  # half of 32: no block leaves


@every_whole
def test_both_have_one_price(cls: Any) -> None:
    """Counted on the merged net, in which some heads are gone and the others are narrower."""
    check_prices(*built(cls, 8), heads="both", ratio=0.5)


@pytest.mark.parametrize("allocation", ["greedy", "uniform"])
@pytest.mark.parametrize("cls", [Attention, GroupedQueries, GroupedConv], ids=lambda c: c.__name__)
def test_both_meet_a_budget(cls: Any, allocation: str) -> None:
    model, x = built(cls, 8)
    result = plain_merge(model, x, heads="both", budget={"params": 0.6}, allocation=allocation)
    left, whole = (sum(p.numel() for p in m.parameters()) for m in (result.module, model))
    assert result.report.spent is not None and result.report.spent.left == pytest.approx(left / whole)
    assert left / whole == pytest.approx(0.6, rel=0.04)  # 8 blocks of 4 channels are coarse


@pytest.mark.parametrize("useless", ["head", "place"])
def test_a_budget_takes_heads_or_widths_whichever_lose_less(useless: str) -> None:
    """The projection does not read one of 4 heads, or one of the 4 channels of each head: as many parameters.

    Queries, keys and values are rows of one block and keep equally many channels: one of the keys is useless too.
    """
    model, x = built(Attention, 4)
    parts: Any = model
    with torch.no_grad():
        columns = parts.proj.weight.view(7, 4, SIZE)
        (columns[:, 2] if useless == "head" else columns[:, :, 1]).zero_()
        if useless == "place":
            for rows in (parts.qkv.weight, parts.qkv.bias):
                rows.unflatten(0, (3, 4, SIZE))[1, :, 3] = 0
    share = (7 * 12 + 7) / (7 * 16 + 7)
    result = fxmerge.merge(model, x, heads="both", budget={"params": share + 1e-6}, of="proj", samples=64)
    (plan,) = result.plan.groups
    if useless == "head":
        assert plan.name == "qkv#whole" and plan.kept == (0, 1, 3)
    else:
        assert plan.name == "qkv"
        assert [c for c in range(32) if c not in plan.kept] == [3, 7, 11, 15, 17, 21, 25, 29]
    with torch.no_grad():
        assert compare.difference([model(x)], [result.module(x)]) < 1e-5


class Shuffled(GroupedConv):
    """A channel shuffle deals each group out to all others: no group can leave whole."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.h = nn.Conv2d(blocks * SIZE, blocks * SIZE, 1, groups=blocks)
        self.shuffle = nn.ChannelShuffle(blocks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(F.relu(self.g(F.relu(self.a(x)))))
        return self.out(F.relu(self.c(F.relu(self.h(y)))))


class Slopes(Attention):
    """A slope of the scores for each head, which is no parameter of the graph's own: heads stay."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = torch.arange(1, 5, dtype=q.dtype).view(4, 1, 1) * q.mean((0, 1, 2, 3))
        return (q @ k.transpose(-2, -1) + slopes).softmax(-1) @ v


class PerHead(Attention):
    """A linear map that all heads share stands between: nothing says which head its output is of."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.map = nn.Linear(SIZE, SIZE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.map(q), k, v)


class Sloped(Attention):
    """ALiBi, as it is written with baddbmm: a number for each head, beside the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (p.reshape(-1, SIDE, SIZE) for p in (q, k, v))
        slopes = torch.arange(4, dtype=q.dtype).repeat(len(q) // 4).view(-1, 1, 1)
        return (slopes.baddbmm(q, k.transpose(1, 2)).softmax(-1) @ v).view(-1, 4, SIDE, SIZE)


class Masked(Attention):
    """scaled_dot_product_attention with a mask of its own for each head."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.register_buffer("mask", torch.rand(blocks, SIDE, SIDE))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class Unruled(Blocked):
    """The scores pass an op without a rule, behind which nothing says that they are of heads."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.q, self.k, self.v = (nn.Linear(5, blocks * SIZE) for _ in range(3))
        self.proj, self.out = nn.Linear(blocks * SIZE, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.blocks, SIZE)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = torch.special.bessel_j0(q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(F.relu(self.proj(y.transpose(1, 2).flatten(2))))


@pytest.mark.parametrize("cls", [Shuffled, Slopes, Sloped, PerHead, Masked, Unruled], ids=lambda c: c.__name__)
def test_blocks_lose_width_where_they_cannot_leave_whole(cls: Any) -> None:
    """And then heads="whole" and heads="both" give just what heads="width" gives."""
    model, x = built(cls)
    first, *others = (plain_merge(model, x, heads=h, decomposition="prune") for h in ("width", "whole", "both"))
    for other in others:
        assert [(p.name, p.kept) for p in first.plan.groups] == [(p.name, p.kept) for p in other.plan.groups]
        with torch.no_grad():
            assert torch.equal(first.module(x), other.module(x))
    assert sum(p.numel() for p in first.module.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["PackedAttention", "GroupedRepeated", "GroupedExpanded", "GroupedByOption", "Windows", "MaskedEncoder"]
)
def test_nets_by_others_lose_heads(name: str) -> None:
    model, example, _, _ = made(name)
    result = plain_merge(model, example, heads="whole")
    assert any(p.channels == 2 and len(p.kept) == 1 for p in result.plan.groups)
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10


def test_vision_transformer_of_torch() -> None:
    """nn.MultiheadAttention, written out as it is traced."""
    layer = randomised(nn.TransformerEncoderLayer(16, 4, 12, batch_first=True)).eval()
    model = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3)).eval()
    x = torch.randn(2, SIDE, 5)
    result = plain_merge(model, x, heads="whole")
    assert len(of_blocks(result).kept) == 2
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
