"""Oracles on every net of the table: no tie is missing, none is superfluous, and every absorption is exact."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import Analysis, Options, Plan, verify
from fxmerge.analysis.groups import group
from fxmerge.graph import compare
from fxmerge.ir.groups import Grouping
from fxmerge.ir.provenance import Provenance, Tie
from fxmerge.plan import GroupPlan
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.outputs import leaves

pytestmark = pytest.mark.usefixtures("one_thread")
every_net = pytest.mark.parametrize("name", NETS)


@cache
def analysis(name: str) -> Analysis:
    return fxmerge.analyze(*NETS[name]())


def operands(found: Analysis) -> tuple[Any, Any, Grouping]:
    return found.captured, found.facts, found.grouping


@every_net
def test_every_net_has_a_group(name: str) -> None:
    assert analysis(name).groups


@every_net
def test_permutation(name: str) -> None:
    found = verify.permutation(*operands(analysis(name)))
    assert set(found) == {g.name for g in analysis(name).groups}
    assert max(found.values()) < 1e-10


@every_net
def test_no_member_is_superfluous(name: str) -> None:
    found = verify.overcoupling(*operands(analysis(name)))
    assert found
    assert min(found.values()) > 1e-6, found


@every_net
def test_duplicates_merge_exactly(name: str) -> None:
    """Given the channels to keep, `mostsim` finds the original and the scale of each copy."""
    found = analysis(name)
    model, args, kept = verify.duplicate(*operands(found))
    assert set(kept) == {g.name for g in found.groups if g.partners and g.consumers}
    sizes = {g.name: g.channels for g in found.groups}
    given = tuple(GroupPlan(group, sizes[group], tuple(index.tolist())) for group, index in kept.items())
    result = fxmerge.apply(Plan(Options(threshold=0.0, refit="none"), given), model, args)
    assert result.report.verdict.error < 1e-8 or any(g.mixers for g in found.groups)
    assert {p.name: p.kept for p in result.plan.groups} == {p.name: p.kept for p in given}


@every_net
def test_duplicates_are_the_ones_that_go(name: str) -> None:
    """Selection by norm drops a copy that is smaller than its original; after GELU and the like, copies are equal."""
    found = analysis(name)
    model, args, kept = verify.duplicate(*operands(found), seed=1)
    counts = {group: len(index) for group, index in kept.items()}
    result = plain_merge(model, args, keep=counts, ratio=0.0, threshold=0.0, selection="l2")
    chosen = {p.name: list(p.kept) for p in result.plan.groups}
    free = [g.name for g in found.groups if not g.scale_blocks and g.name in kept]
    assert {group: chosen[group] for group in free} == {group: kept[group].tolist() for group in free}
    if not any(g.scale_blocks or g.mixers for g in found.groups):
        assert result.report.verdict.error < 1e-8


@every_net
def test_ratio_0_gives_the_same_bits(name: str) -> None:
    model, inputs = NETS[name]()
    result = plain_merge(model, inputs, ratio=0.0)
    with torch.no_grad():
        one, other = leaves(model(inputs)), leaves(result.module(inputs))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert result.report.verdict.error == 0
    assert result.report.after == result.report.before
    assert "100.0 % left" in result.report.text()


@every_net
def test_the_same_seed_gives_the_same_bits_and_the_model_is_untouched(name: str) -> None:
    model, inputs = NETS[name]()
    before, attributes = copy.deepcopy(model.state_dict()), anatomy(model)
    first, second = (plain_merge(model, inputs, ratio=0.4, seed=3) for _ in range(2))
    assert first.plan == second.plan
    assert first.module.code == second.module.code
    assert equal_states(first.module.state_dict(), second.module.state_dict())
    assert first.plan.groups
    assert equal_states(model.state_dict(), before)
    assert anatomy(model) == attributes


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


def anatomy(model: nn.Module) -> dict[str, dict[str, str]]:
    """Every attribute of every module as text; tensors and submodules by their ids."""
    return {
        name: {
            key: str({k: id(v) for k, v in value.items()}) if isinstance(value, dict) else repr(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


class Wide(nn.Module):
    """conv-bn-relu-conv and linear-relu-linear, with more channels than they need."""

    def __init__(self, conv_width: int, linear_width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, conv_width, 3, padding=1)
        self.n = nn.BatchNorm2d(conv_width)
        self.b = nn.Conv2d(conv_width, 6, 3)
        self.c = nn.Linear(6, linear_width)
        self.d = nn.Linear(linear_width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.n(self.a(x)))).mean((2, 3))
        out: Tensor = self.d(torch.relu(self.c(x)))
        return out


def widened(seed: int) -> tuple[Wide, Wide, Tensor, Tensor]:
    """(narrow, wide, which conv channels are copies, which linear units are): two nets that compute the same function.

    Copy i of channel j has r_i < 1 times j's producer row, and s_i times j's output after the BatchNorm. The consumer's
    column of j is divided: j keeps a share of it, and i has the rest divided by s_i.
    """
    g = torch.Generator().manual_seed(seed)
    narrow, wide = Wide(8, 10).double().eval(), Wide(11, 14).double().eval()
    with torch.no_grad():
        for value in [*narrow.parameters(), *narrow.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=g))
        narrow.n.running_var.copy_(0.5 + torch.rand(8, generator=g))
        narrow.n.weight.copy_(narrow.n.weight.abs() + 0.3)
        for part in ("a", "c"):  # every original row is longer than every copy
            layer = getattr(narrow, part)
            rows = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
            length = (rows if part == "c" else rows[:, :-1]).norm(dim=1)
            factor = (1 + torch.rand(len(length), generator=g)) / length
            layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))
            layer.bias.mul_(factor)

        def copies(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
            origin = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=g)])
            order = torch.randperm(m, generator=g)
            return origin[order], (order >= n), torch.rand(m, generator=g).double()

        origin, copied, draw = copies(8, 11)
        r, s = torch.where(copied, 0.1 + 0.3 * draw, 1.0), torch.where(copied, 0.4 + draw.flip(0), 1.0)
        wide.a.weight.copy_(narrow.a.weight[origin] * r.view(-1, 1, 1, 1))
        wide.a.bias.copy_(narrow.a.bias[origin] * r)
        wide.n.running_mean.copy_(narrow.n.running_mean[origin] * r)
        wide.n.running_var.copy_(r.square() * (narrow.n.running_var[origin] + narrow.n.eps) - narrow.n.eps)
        wide.n.weight.copy_(narrow.n.weight[origin] * s)
        wide.n.bias.copy_(narrow.n.bias[origin] * s)
        share = parts(origin, 8, g)
        wide.b.weight.copy_(narrow.b.weight[:, origin] * (share / s).view(1, -1, 1, 1))
        wide.b.bias.copy_(narrow.b.bias)
        origin, cut, draw = copies(10, 14)
        r = torch.where(cut, 0.1 + 0.3 * draw, 1.0)
        wide.c.weight.copy_(narrow.c.weight[origin] * r[:, None])
        wide.c.bias.copy_(narrow.c.bias[origin] * r)
        wide.d.weight.copy_(narrow.d.weight[:, origin] * (parts(origin, 10, g) / r))
        wide.d.bias.copy_(narrow.d.bias)
    return narrow, wide, copied, cut


def parts(origin: Tensor, n: int, g: torch.Generator) -> Tensor:
    """Random shares, of either sign, that sum to 1 over the copies of each original."""
    share = torch.randn(len(origin), generator=g).double()
    total = torch.zeros(n).double().index_add_(0, origin, share)
    alone = torch.bincount(origin, minlength=n)[origin]
    return share + (1 - total[origin]) / alone


@pytest.mark.parametrize("seed", range(4))
def test_a_widened_net_merges_back(seed: int) -> None:
    narrow, wide, copied, cut = widened(seed)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        torch.testing.assert_close(wide(x), narrow(x), rtol=1e-9, atol=1e-9)
    result = plain_merge(wide, x, keep={"a": 8, "c": 10, "b": 1.0})
    dropped = {p.name: set(range(p.channels)) - set(p.kept) for p in result.plan.groups}
    assert dropped == {"a": set(copied.nonzero().flatten().tolist()), "c": set(cut.nonzero().flatten().tolist())}
    assert compare.difference(compare.outputs(narrow, (x,)), compare.outputs(result.module, (x,))) < 1e-8


@pytest.mark.parametrize("decomposition", ["prune", "mostsim"])
def test_dead_channels_are_dropped_and_nothing_changes(decomposition: str) -> None:
    model, x = NETS["residual"]()
    gone = {"stem": [1, 5, 6], "a": [0, 2, 9, 15]}
    producers = {"stem": ("stem", "n", "b", "bn"), "a": ("a", "an")}
    with torch.no_grad():
        for group, names in producers.items():
            for part in map(model.get_submodule, names):
                for value in (part.weight, part.bias, getattr(part, "running_mean", None)):
                    if isinstance(value, Tensor):
                        value[gone[group]] = 0
    result = plain_merge(model, x, keep={"stem": 9, "a": 12}, decomposition=decomposition, selection="l2")
    found = {p.name: sorted(set(range(p.channels)) - set(p.kept)) for p in result.plan.groups}
    assert found == gone
    assert result.report.verdict.error < 1e-6


def superfluous_ties(found: Analysis, facts: Provenance) -> list[str]:
    """Nodes whose ties are superfluous: the groups without them differ, and permuting these leaves the output alone."""
    whole = composition(group(found.captured, facts))
    spare = []
    for node in dict.fromkeys(tie.node for tie in facts.ties):
        fewer = dataclasses.replace(facts, ties=tuple(tie for tie in facts.ties if tie.node != node))
        grouping = group(found.captured, fewer)
        if composition(grouping) != whole and max(verify.permutation(found.captured, fewer, grouping).values()) < 1e-6:
            spare.append(node)
    return spare


def composition(grouping: Grouping) -> set[tuple[int, ...]]:
    """The labels of each channel of each group."""
    order = torch.argsort(grouping.atom, stable=True)
    sizes = torch.bincount(grouping.atom)
    labels = order.split(sizes.tolist())
    return {tuple(labels[a].tolist()) for g in grouping.groups for a in g.atoms.tolist()}


@every_net
def test_no_tie_is_superfluous(name: str) -> None:
    assert superfluous_ties(analysis(name), analysis(name).facts) == []


def test_a_tie_too_many_is_seen() -> None:
    """A tie between the channels of two unrelated layers is found to be superfluous."""
    found = analysis("mlp")
    one, other = (layer.writes for layer in found.facts.layers[:2])
    assert one is not None
    assert other is not None
    facts = dataclasses.replace(found.facts, ties=(*found.facts.ties, Tie("sabotage", one[:12], other)))
    assert superfluous_ties(found, facts) == ["sabotage"]


def _no_tie(ctx: Any, input: Any, *rest: Any, **kwargs: Any) -> Any:
    return input


@pytest.mark.parametrize(
    ("rule", "kind", "name"),
    [("batch_norm", "per_channel", "chain_2d"), ("prelu", "per_channel", "activations"), ("add", "tie", "residual"),
     ("mul", "tie", "gate"), ("div", "per_channel", "raw_parameters")],
)  # fmt: skip
def test_a_rule_that_forgets_its_tie_is_seen(rule: str, kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The permutation oracle detects a rule that returns its first operand's labels and ties nothing."""
    careless = dataclasses.replace(fxmerge.RULES[rule], kind=kind, apply=_no_tie, commutes=True)
    monkeypatch.setitem(fxmerge.RULES, rule, careless)
    found = fxmerge.analyze(*NETS[name]())
    assert max(verify.permutation(*operands(found)).values()) > 1e-3


class Packed(nn.Module):
    """Queries, keys and values are the rows of one block, so that they lose equally many channels."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.out = nn.Linear(5, 3 * heads * size), nn.Linear(heads * size, 3)

    def forward(self, x: Tensor) -> Tensor:
        cut = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4).contiguous()
        mixed = F.scaled_dot_product_attention(cut[0], cut[1], cut[2])
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize(("heads", "size"), [(1, 5), (2, 4)])
def test_channels_that_no_weight_reads_get_zeros(heads: int, size: int) -> None:
    """Queries and keys are summed without a weight, so that nothing can absorb a copy of one of them."""
    model = randomised(Packed(heads, size)).double().eval()
    found = fxmerge.analyze(model, torch.randn(2, 6, 5, dtype=torch.float64))
    (group,) = found.groups
    copied, args, kept = verify.duplicate(*operands(found))
    given = (GroupPlan(group.name, group.channels, tuple(kept[group.name].tolist())),)
    result = fxmerge.apply(Plan(Options(threshold=0.0, refit="none"), given), copied, args)
    assert result.report.verdict.error < 1e-10
    assert result.module.qkv.out_features < model.qkv.out_features
