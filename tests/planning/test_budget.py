"""Budgets: met on the merged model as torch counts it, at the least error; what cannot be met says what could."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Linear
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge import ALLOCATORS, FxMergeError, Options, Plan
from fxmerge.graph import latency
from fxmerge.graph.latency import Timing, compared
from fxmerge.methods import elimination
from fxmerge.methods.allocation import Ladder, Price, Problem, greedy, hull, uniform
from fxmerge.methods.elimination import RIDGE, curve, eliminate
from fxmerge.methods.evidence import Reading
from fxmerge.planning import budget
from tests.helpers.netmaking import Net, conv, one_thread, plain_merge, randomised, raw  # noqa: F401

merging = importlib.import_module("fxmerge.pipeline")

pytestmark = pytest.mark.usefixtures("one_thread")


def flops(module: nn.Module, x: Any) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module.eval()(x)
    return int(counter.get_total_flops())


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Nets


def chain(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.n1(m.c1(x)))
    x = torch.relu(m.n2(m.c2(x)))
    return m.fc(torch.relu(m.c3(x)).mean((2, 3)))


def residual(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.n1(m.c1(x)))
    x = torch.relu(x + m.n3(m.c3(torch.relu(m.n2(m.c2(x))))))
    return m.fc(x.mean((2, 3)))


def dense(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.c1(x))
    x = torch.cat([x, torch.relu(m.c2(x))], 1)
    x = torch.cat([x, torch.relu(m.c3(x))], 1)
    return m.fc(x.mean((2, 3)))


def mobile(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.n1(m.c1(x)))
    x = torch.relu(m.n2(m.dw(x)))
    return m.fc(torch.relu(m.grouped(m.c2(x))).mean((2, 3)))


def attention(m: Any, x: Tensor) -> Tensor:
    x = m.a(x) + m.position
    q, k, v = m.qkv(m.n(x)).view(-1, 8, 3, 4, x.shape[-1] // 4).permute(2, 0, 3, 1, 4).unbind(0)
    x = x + m.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return m.fc((x + m.down(nn.functional.gelu(m.up(x)))).mean(1))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "chain": lambda: (
        Net(chain, c1=conv(3, 32, bias=False), n1=BatchNorm2d(32), c2=conv(32, 48, bias=False), n2=BatchNorm2d(48),
            c3=conv(48, 40), fc=Linear(40, 10)), torch.randn(2, 3, 8, 8)),
    "residual": lambda: (
        Net(residual, c1=conv(3, 32, bias=False), n1=BatchNorm2d(32), c2=conv(32, 64, bias=False), n2=BatchNorm2d(64),
            c3=conv(64, 32, bias=False), n3=BatchNorm2d(32), fc=Linear(32, 10)), torch.randn(2, 3, 8, 8)),
    "dense": lambda: (
        Net(dense, c1=conv(3, 24), c2=conv(24, 32), c3=conv(56, 40), fc=Linear(96, 10)), torch.randn(2, 3, 8, 8)),
    "mobile": lambda: (
        Net(mobile, c1=conv(3, 48), n1=BatchNorm2d(48), dw=conv(48, 48, groups=48), n2=BatchNorm2d(48),
            c2=conv(48, 64, 1), grouped=conv(64, 80, groups=4), fc=Linear(80, 10)), torch.randn(2, 3, 8, 8)),
    "attention": lambda: (
        Net(attention, a=Linear(12, 64), position=raw(8, 64), n=nn.LayerNorm(64), qkv=Linear(64, 192),
            o=Linear(64, 64), up=Linear(64, 160), down=Linear(160, 64), fc=Linear(64, 10)), torch.randn(2, 8, 12)),
}  # fmt: skip


@functools.cache
def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = NETS[name]()
    return randomised(model).eval(), x


@pytest.mark.parametrize("allocation", ALLOCATORS)
@pytest.mark.parametrize("budget", [{"flops": 0.5}, {"flops": 0.8}, {"params": 0.36}], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_a_budget_is_met_within_one_percent(name: str, budget: dict[str, float], allocation: str) -> None:
    model, x = made(name)
    result = plain_merge(model, x, budget=budget, allocation=allocation)
    ((kind, share),) = budget.items()
    left = flops(result.module, x) / flops(model, x) if kind == "flops" else params(result.module) / params(model)
    assert left == pytest.approx(share, rel=0.01)
    spent = result.report.spent
    assert spent is not None and spent.met and spent.left == pytest.approx(left)
    assert "within 1%" in result.report.text() and "NOT" not in spent.line()
    told = json.loads(result.report.json())["budget"]
    assert told == {"kind": kind, "asked": share, "left": left, "noise": None, "of": []}
    again = fxmerge.apply(Plan.from_json(result.plan.json()), model, x)
    assert [g.kept for g in again.plan.groups] == [g.kept for g in result.plan.groups]


@pytest.mark.slow
def test_a_budget_of_parameters_counts_the_biases_of_refit() -> None:
    """Convolutions of one place by 16 channels: each bias is a sixteenth of what it joins."""
    torch.manual_seed(0)
    model = randomised(Net(chain, c1=conv(16, 32, 1, bias=False), n1=BatchNorm2d(32), c2=conv(32, 32, 1, bias=False),
                           n2=BatchNorm2d(32), c3=conv(32, 32, 1, bias=False), fc=Linear(32, 2))).eval()  # fmt: skip
    known = dict(model.named_parameters())
    for share in (0.4, 0.7):
        result = fxmerge.merge(model, torch.randn(2, 16, 8, 8), budget={"params": share}, samples=64, rows=512)
        assert params(result.module) / params(model) == pytest.approx(share, rel=0.01)
        gained = sum(p.numel() for n, p in result.module.named_parameters() if n not in known)
        assert gained > 0.02 * params(result.module)  # without them in the price the budget would be missed


@pytest.mark.parametrize("allocation", ALLOCATORS)
def test_the_whole_budget_changes_nothing(allocation: str) -> None:
    model, x = made("residual")
    for kind in ("flops", "params", "latency"):
        result = fxmerge.merge(model, x, budget={kind: 1.0}, allocation=allocation, samples=16)
        assert not result.plan.groups
        assert torch.equal(result.module(x), model(x))


@pytest.mark.parametrize("allocation", ALLOCATORS)
@pytest.mark.parametrize("name", ["chain", "residual", "mobile"])
def test_multiples_and_the_largest_share(name: str, allocation: str) -> None:
    model, x = made(name)
    found = plain_merge(model, x, budget={"flops": 0.6}, round_to=8, allocation=allocation)
    for group in found.plan.groups:
        assert len(group.kept) % 8 == 0
    free = plain_merge(model, x, budget={"flops": 0.7}, allocation=allocation)
    least = plain_merge(model, x, budget={"flops": 0.7}, max_ratio=0.2, allocation=allocation)
    assert all(len(g.kept) >= 0.8 * g.channels for g in least.plan.groups)
    assert any(len(g.kept) < 0.8 * g.channels for g in free.plan.groups) or allocation == "uniform"


def test_what_keep_says_stands_and_the_others_make_good() -> None:
    model, x = made("chain")
    result = plain_merge(model, x, budget={"flops": 0.5}, keep={"c2": 44, "c1": 1.0})
    widths = {g.name: len(g.kept) for g in result.plan.groups}
    assert "c1" not in widths and widths["c2"] == 44
    assert flops(result.module, x) / flops(model, x) == pytest.approx(0.5, rel=0.01)


def test_what_cannot_be_met_tells_the_least_and_what_to_change() -> None:
    model, x = made("chain")
    bottom = plain_merge(model, x, ratio=0.5)
    least = flops(bottom.module, x) / flops(model, x)
    with pytest.raises(
        FxMergeError, match=r"asks for 10.0% of the FLOPs, but \S+% are left when the 3 groups .* max_ratio"
    ) as why:
        plain_merge(model, x, budget={"flops": 0.1}, max_ratio=0.5)
    assert f"{least:.1%}" in str(why.value)
    for options in ({"keep": {"*": 1.0}}, {"ignore": ("*",)}):
        with pytest.raises(
            FxMergeError, match=r"but 100.0% are left since no group may narrow; .* remove groups from keep and ignore"
        ):
            plain_merge(model, x, budget={"flops": 0.5}, **options)
    with pytest.raises(FxMergeError, match="widen scope"):
        plain_merge(*made("residual"), budget={"params": 0.1}, scope="internal")
    with pytest.raises(FxMergeError, match=r"no group may narrow; ask for a larger share or lower round_to \(now 64\)"):
        plain_merge(model, x, budget={"flops": 0.5}, round_to=64)


def test_widths_that_come_no_nearer_are_told() -> None:
    model, x = made("chain")
    result = plain_merge(model, x, budget={"flops": 0.5}, round_to=16, keep={"c1": 1.0, "c3": 1.0})
    assert result.report.spent is not None and not result.report.spent.met
    assert result.report.spent.left <= 0.5
    assert "NOT within 1%" in result.report.text()
    assert "multiples of round_to, 16" in result.report.notes[0]
    less = plain_merge(model, x, budget={"flops": 0.9}, keep={"c1": 8}).report
    assert (
        less.spent is not None
        and less.spent.left < 0.89
        and less.notes == ("the channels given by keep leave less than the budget allows",)
    )


# Latency, by a clock that goes by FLOPs, and by the real one


def clock(model: nn.Module, x: Tensor, noise: float) -> Callable[..., Timing]:
    whole = flops(model, x)

    def compared(original: nn.Module, other: nn.Module, args: Any, kwargs: Any, seconds: float = 1.0) -> Timing:
        share = flops(other, x) / whole
        return Timing(0.2 + 0.7 * share + 0.1 * share**2, noise, 1e-3)

    return compared


@pytest.mark.parametrize("allocation", ALLOCATORS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_latency_is_met_within_three_percent(share: float, allocation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made("chain")
    for module in (budget, merging):
        monkeypatch.setattr(module, "compared", clock(model, x, 0.001))
    result = plain_merge(model, x, budget={"latency": share}, allocation=allocation)
    spent = result.report.spent
    assert spent is not None and spent.met and spent.left == pytest.approx(share, rel=0.03)
    assert "+- 0.1%" in result.report.text() and not result.report.notes
    assert json.loads(result.report.json())["budget"]["noise"] == 0.001


def test_a_latency_out_of_reach_and_one_that_nobody_can_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made("chain")
    monkeypatch.setattr(merging, "compared", clock(model, x, 0.001))
    monkeypatch.setattr(budget, "compared", clock(model, x, 0.001))
    with pytest.raises(FxMergeError, match=r"asks for 15.0% of the latency, but 2\d.\d% is left at .* raise max_ratio"):
        plain_merge(model, x, budget={"latency": 0.15})
    monkeypatch.setattr(budget, "compared", clock(model, x, 0.05))
    noisy = plain_merge(model, x, budget={"latency": 0.5})
    assert "the noise of the latency is 5.0%, above the tolerance of 3%" in noisy.report.text()
    monkeypatch.setattr(budget, "compared", clock(model, x, 0.4))
    with pytest.raises(FxMergeError, match=r"cannot be measured on this machine: .*, differ by 40%"):
        plain_merge(model, x, budget={"latency": 0.5})


class Clock:
    """A clock that only its modules move: each call takes so long, give or take a share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
        self.now, self.spread, self.random = 0.0, spread, np.random.default_rng(0)
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def module(self, seconds: float) -> nn.Module:
        def forward(net: Any, x: Tensor) -> Tensor:
            self.now += seconds * (1 + self.spread * self.random.standard_normal())
            return x

        return Net(forward)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1])
def test_the_clock_tells_a_share_and_how_sure_it_is(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, spread)
    found = compared(clock.module(0.02), clock.module(0.013), (torch.zeros(1),), {}, 4.0)
    assert found.seconds == pytest.approx(0.02, rel=2 * spread / 3 + 1e-9)
    assert found.share == pytest.approx(0.65, abs=3 * found.noise + 1e-9)
    assert (found.noise == 0) == (spread == 0) and found.noise <= spread
    rounds = clock.now / 0.053
    assert rounds < 15 if spread == 0 else rounds < 85  # a quiet machine is done soon, a noisy one after 4 seconds


@pytest.mark.slow
def test_a_latency_budget_by_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine at work may be too noisy to hit the mark, or to tell anything: both are said."""
    torch.manual_seed(0)
    model = randomised(Net(chain, c1=conv(3, 64, bias=False), n1=BatchNorm2d(64), c2=conv(64, 64, bias=False),
                           n2=BatchNorm2d(64), c3=conv(64, 64), fc=Linear(64, 10))).eval()  # fmt: skip
    monkeypatch.setattr(budget, "BRIEF", 0.3)
    monkeypatch.setattr(latency, "SECONDS", 0.5)
    try:
        report = plain_merge(model, torch.randn(4, 3, 32, 32), budget={"latency": 0.6}).report
    except FxMergeError:
        return
    assert report.spent is not None and report.spent.noise is not None and report.spent.left > 0
    assert report.spent.met != ("NOT within 3%" in report.text(400))


# Allocators on problems small enough to try everything


def linear(costs: list[float]) -> Price:
    """sum_g cost_g k_g, of groups with one cell and 6 channels."""
    n = len(costs)
    slots = {str(g): slice(g, g + 1) for g in range(n)}
    rows, factors = csr_array(np.vstack([np.eye(n), np.zeros(n)])), np.arange(n)[:, None]
    return Price(
        slots=slots,
        full=np.full(n, 6.0),
        coefficients=np.array(costs),
        factors=factors,
        widths=rows,
        fixed=np.array([0.0] * n + [1.0]),
        original=6 * sum(costs),
    )


def everything(problem: Problem) -> list[tuple[float, float]]:
    """(error, cost) of every choice within the budget."""
    tried = itertools.product(*(range(len(x.counts)) for x in problem.ladders))
    found = [(sum(x.errors[r] for x, r in zip(problem.ladders, t, strict=True)), problem.cost(t)) for t in tried]
    return [f for f in found if f[1] <= problem.target]


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_best_of_all_on_convex_errors(seed: int) -> None:
    """At equal costs and convex errors greedy is exact (Fox, 1966)."""
    random = np.random.default_rng(seed)
    errors = [np.cumsum(np.sort(np.concatenate([[0], random.random(5)]))) - 0 for _ in range(3)]
    ladders = tuple(Ladder(np.arange(6, 0, -1.0)[:, None], e) for e in errors)
    problem = Problem(ladders, linear([1.0, 1.0, 1.0]), target=float(random.integers(5, 16)))
    rungs = greedy(problem)
    assert problem.cost(rungs) <= problem.target
    own = sum(x.errors[r] for x, r in zip(ladders, rungs, strict=True))
    assert own == pytest.approx(min(e for e, _ in everything(problem)))


def test_greedy_passes_a_step_that_costs_much_where_more_can_be_had_behind_it() -> None:
    """The hull sees past a hump: 3 channels for 1.1 are cheaper than 3 for 0.9 each."""
    hump, plain = (
        Ladder(np.array([[6.0], [5], [4], [3]]), np.array([0, 1.0, 1.05, 1.1])),
        Ladder(np.array([[6.0], [5], [4], [3]]), np.array([0, 0.9, 1.8, 2.7])),
    )
    rungs = greedy(Problem((hump, plain), linear([1.0, 1.0]), 9.0))
    assert rungs.tolist() == [3, 0]


def test_uniform_keeps_the_same_share_of_all() -> None:
    ladders = tuple(Ladder(np.arange(6, 0, -1.0)[:, None], np.zeros(6)) for _ in range(3))
    assert uniform(Problem(ladders, linear([1.0, 2.0, 3.0]), 18.0)).tolist() == [3, 3, 3]
    assert uniform(Problem(ladders, linear([1.0, 2.0, 3.0]), 17.0)).tolist() in (
        [3, 4, 3],
        [4, 3, 4],
        [4, 4, 3],
        [3, 3, 4],
    )


@pytest.mark.parametrize("seed", range(5))
def test_hull_is_the_greatest_convex_function_below(seed: int) -> None:
    random = np.random.default_rng(seed)
    totals = np.sort(random.choice(40, 9, replace=False))[::-1].astype(float)
    errors = np.concatenate([[0], np.sort(random.random(8))])
    found = hull(totals, errors)
    assert (found <= errors + 1e-12).all()
    slopes = np.diff(found) / -np.diff(totals)
    assert (np.diff(slopes) >= -1e-12).all()
    for at, total in enumerate(totals):  # every value is a mixture of two points of the curve: no lower one is
        pairs = [
            errors[i] + (errors[j] - errors[i]) * (totals[i] - total) / (totals[i] - totals[j])
            for i in range(at + 1)
            for j in range(at, 9)
            if i < j
        ]
        assert found[at] == pytest.approx(min([*pairs, errors[at]]), abs=1e-12)


# Curves


@pytest.mark.parametrize(("consumers", "wide"), [(1, 1024), (2, 1024), (2, 1)])
def test_a_curve_is_what_the_best_re_solving_leaves(
    consumers: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every k the loss is that of the ridge regression on the channels that eliminate keeps, solved by itself."""
    monkeypatch.setattr(elimination, "WIDE", wide)  # 1: in float32
    torch.manual_seed(0)
    n, q, found = 12, 3, []
    for _ in range(consumers):
        x = torch.randn(200, n * q, dtype=torch.float64) @ torch.randn(n * q, n * q, dtype=torch.float64)
        weight = torch.randn(5, n * q, dtype=torch.float64)
        found.append(Reading(x.T @ x, weight, torch.arange(n), torch.arange(n * q).view(n, q)))
    losses = curve(found, torch.arange(n), 2)
    assert losses[n] == 0 and bool(torch.isinf(losses[:2]).all())
    for count in range(2, n):
        kept = eliminate(found, torch.arange(n), count)
        expected = 0.0
        for r in found:
            h = r.gram + RIDGE * r.gram.diagonal().mean() * torch.eye(n * q, dtype=torch.float64)
            k = r.columns[kept].flatten()
            solved = torch.linalg.lstsq(h[k][:, k], h[k] @ r.weight.T).solution
            rest = r.weight @ h @ r.weight.T - r.weight @ h[:, k] @ solved
            expected += float(rest.trace() / (r.weight @ r.gram @ r.weight.T).trace())
        assert float(losses[count]) == pytest.approx(expected, rel=1e-6 if wide > 1 else 1e-3)


@pytest.mark.parametrize("options", [
    {"refit": "none"}, {"refit": "none", "decomposition": "prune"}, {"refit": "none", "decomposition": "lstsq"},
    {"samples": 32, "rows": 512},
], ids=str)  # fmt: skip
def test_greedy_takes_channels_that_nobody_reads(options: dict[str, Any]) -> None:
    """Half of c2's channels, which are what the budget asks for, are multiplied by zero."""
    torch.manual_seed(0)
    model = randomised(Net(chain, c1=conv(3, 16, bias=False), n1=BatchNorm2d(16), c2=conv(16, 16, bias=False),
                           n2=BatchNorm2d(16), c3=conv(16, 16), fc=Linear(16, 10))).eval()  # fmt: skip
    with torch.no_grad():
        parts: Any = model
        parts.c3.weight[:, ::2] = 0
        parts.c2.weight[::2] *= 0.01
        parts.n2.running_var[::2] *= 0.0001
    x = torch.randn(2, 3, 8, 8)
    result = fxmerge.merge(model, x, budget={"flops": 0.545}, **options)
    assert [(g.name, len(g.kept)) for g in result.plan.groups] == [("c2", 8)]
    assert result.report.verdict.error < 0.01


def depthwise(m: Any, x: Tensor) -> Tensor:
    x = F.relu6(m.n0(m.stem(x)))
    for at in range(3):
        x = F.relu6(getattr(m, f"nd{at}")(getattr(m, f"d{at}")(x)))
        x = F.relu6(getattr(m, f"np{at}")(getattr(m, f"p{at}")(x)))
    return m.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def trained_like() -> tuple[nn.Module, Tensor]:
    """Depthwise-separable blocks, the last of them wide, with the BatchNorm statistics of images with a pattern."""
    widths, parts = (8, 16, 32, 160), dict[str, nn.Module]()
    for at, (i, o) in enumerate(itertools.pairwise(widths)):
        parts |= {f"d{at}": conv(i, i, groups=i, bias=False), f"nd{at}": BatchNorm2d(i, momentum=None)}
        parts |= {f"p{at}": conv(i, o, 1, bias=False), f"np{at}": BatchNorm2d(o, momentum=None)}
    model = Net(depthwise, stem=conv(3, 8, bias=False), n0=BatchNorm2d(8, momentum=None), **parts, fc=Linear(160, 20))
    low = torch.randn(640, 3, 3, 3)
    x = F.interpolate(low, size=12, mode="bilinear") + 0.2 * torch.randn(640, 3, 12, 12)
    with torch.no_grad():
        model.train()(x[:512])
    return model.eval(), x


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"flops": 0.7}, {"params": 0.6}], ids=str)
def test_greedy_is_not_below_uniform_on_a_depthwise_net(budget: dict[str, float]) -> None:
    """Few samples make the wide last layer look redundant: 160 channels have at most 31 directions on 32 samples."""
    torch.manual_seed(0)
    model, x = trained_like()
    off, few = {}, list(x[:32].split(8))
    for allocation in ("greedy", "uniform"):
        merged = fxmerge.merge(model, x[:2], budget=budget, allocation=allocation, calibration=few).module
        with torch.no_grad():
            y, z = model(x[512:]), merged(x[512:])
        off[allocation] = float((y - z).square().sum() / (y - y.mean(0)).square().sum())
    assert off["greedy"] < 1.05 * off["uniform"] and off["greedy"] < 0.5


def test_uniform_is_taken_where_it_loses_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation that takes all from the last group is not kept, and the report says so."""

    def astray(problem: Problem) -> Any:
        rungs = np.zeros(len(problem.ladders), dtype=np.int64)
        for g, bottom in reversed([*enumerate(problem.bottom)]):
            while rungs[g] < bottom and problem.cost(rungs) > problem.target:
                rungs[g] += 1
        return rungs

    monkeypatch.setitem(ALLOCATORS, "astray", astray)
    model, x = made("chain")
    options: dict[str, Any] = {"budget": {"flops": 0.7}, "decomposition": "prune"}
    want = plain_merge(model, x, allocation="uniform", **options)
    found = plain_merge(model, x, allocation="astray", **options)
    assert [g.kept for g in found.plan.groups] == [g.kept for g in want.plan.groups]
    assert any(note.startswith("the allocation is uniform: before refit, astray gives") for note in found.report.notes)
    assert not want.report.notes


def test_options_go_through_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from fxmerge.cli.main import main

    (tmp_path / "net.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(),\n"
        "        torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))\n"
        "example_inputs = torch.zeros(2, 8)\n"
    )
    flags = ["merge", f"{tmp_path / 'net.py'}:make", "--out", str(tmp_path / "out"), "--budget", "flops", "0.5"]
    assert main([*flags, "--refit", "none", "--allocation", "uniform"]) == 0
    assert "50.0% of the FLOPs requested" in capsys.readouterr().out
    assert main([*flags, "--ratio", "0.5"]) != 0
    assert "contradict" in capsys.readouterr().err
    assert Options(budget={"flops": 0.5}) == Plan.from_json(
        (tmp_path / "out" / "plan.json").read_text()
    ).options.replace(refit="synthetic", allocation="greedy")
