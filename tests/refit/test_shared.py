"""Refit of weights that serve several calls, and of models on which it used to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError, Options, Plan
from fxmerge.graph.compare import difference
from fxmerge.plan import GroupPlan
from fxmerge.refit import refit_layers, solve
from fxmerge.refit.contradiction import contradiction
from fxmerge.refit.records import Refitted
from fxmerge.refit.shared import COSTLY, DEPENDENT, UNLIKE
from tests.helpers.netmaking import plain_merge, randomised


class Towers(nn.Module):
    """One pair of layers on two inputs of different scales."""

    def __init__(self, spelling: str = "modules") -> None:
        super().__init__()
        self.a, self.b, self.spelling = nn.Linear(6, 8), nn.Linear(8, 5, bias=spelling != "functions"), spelling

    def tower(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return F.linear(h, self.b.weight) if self.spelling == "functions" else self.b(h)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.tower(x), self.tower(y)


def given(model: nn.Module, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(50, 6, generator=g), 3 + 2 * torch.randn(50, 6, generator=g)) for _ in range(count)]


@pytest.mark.parametrize("spelling", ["modules", "functions"])
@pytest.mark.parametrize("exported", [False, True])
def test_a_shared_weight_is_solved_on_the_rows_of_all_calls(
    spelling: str, exported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch.linalg.lstsq on the stacked rows of both towers; on one tower's rows it would be another weight."""
    monkeypatch.setattr(solve, "RIDGE", 1e-9)
    torch.manual_seed(0)
    model = Towers(spelling).eval()
    batches = given(model)
    kept = (0, 2, 3, 5, 6)
    plan = Plan(Options(decomposition="prune", refit="calibration"), (GroupPlan("a", 8, kept),))
    source = torch.export.export(model, batches[0]) if exported else model
    result = fxmerge.apply(plan, source, batches[0], calibration=batches)
    with torch.no_grad():
        inside = [[torch.relu(model.a(pair[i])) for pair in batches] for i in (0, 1)]
        rows = torch.cat([torch.cat(inside[0]), torch.cat(inside[1])]).double()
        wanted = F.linear(rows, model.b.weight.double(), None if model.b.bias is None else model.b.bias.double())
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        alone = torch.cat([rows[:, list(kept)], ones], 1)
        folds = torch.arange(400) % 8  # of which one is held out, and each judges in turn
        solutions = [torch.linalg.lstsq(alone[folds != f], wanted[folds != f]).solution for f in range(8)]
        expected = solutions[7]
        of_one = torch.linalg.lstsq(alone[:200], wanted[:200]).solution
        gaps = [(alone @ solutions[f] - wanted)[folds == f].square().sum() for f in range(8)]
        best = float(torch.stack(gaps).sum() / wanted.square().sum())
        outputs = result.module(*batches[2])
    assert (of_one - expected).abs().max() > 0.05
    found = [alone[100:150] @ expected, alone[300:350] @ expected]
    assert difference(found, list(outputs)) < 1e-4
    (record,) = [r for r in result.report.refitted if not r.note]
    assert record.after == pytest.approx(best, rel=1e-3) and record.before > record.after
    interpreted = torch.fx.Interpreter(result.module).run(*batches[2])
    assert difference(list(outputs), list(interpreted)) == 0


class Pyramid(nn.Module):
    """Heads shared by two levels, and a layer of the second level alone that comes between their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.h1, self.n, self.h2 = nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.Conv2d(10, 4, 1)

    def head(self, x: Tensor) -> Tensor:
        return self.h2(torch.relu(self.n(self.h1(x))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.relu(self.stem(x))
        return [self.head(x), self.head(torch.relu(self.down(x)))]


def test_every_level_gets_better_on_inputs_not_seen() -> None:
    torch.manual_seed(0)
    model = randomised(Pyramid(), 1).eval()
    batches = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    options: Any = {"ratio": 0.4, "selection": "l2"}
    result = fxmerge.merge(model, batches[0][:2], calibration=batches, **options)
    plain = plain_merge(model, batches[0][:2], **options)
    assert [r.name for r in result.report.refitted] == ["down", "h1", "h2"]
    assert all(r.solved and r.after < r.before for r in result.report.refitted)
    unseen = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        whole, refitted, before = model(unseen), result.module(unseen), plain.module(unseen)
    for level in (0, 1):
        assert difference([whole[level]], [refitted[level]]) < 0.85 * difference([whole[level]], [before[level]])


def test_a_model_whose_layers_are_called_once_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    start = refit_layers._Refit._start
    monkeypatch.setattr(refit_layers._Refit, "_start", lambda self: (runs.append(1), start(self))[1])
    torch.manual_seed(0)
    fxmerge.merge(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6), samples=64)
    assert runs == [1]
    fxmerge.merge(Pyramid().eval(), torch.randn(2, 3, 8, 8), samples=64)
    assert len(runs) == 1 + 3  # once more for each of the two shared weights


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        for _ in range(2):
            x = x + self.b(torch.relu(self.a(x)))
        return self.o(x)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """A decoder whose weight is an encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.i(x))
        return self.a(x), self.b(x)


@pytest.mark.parametrize(("make", "why"), [(Loop, DEPENDENT), (Tied, UNLIKE)])
def test_calls_without_an_order_or_of_different_layers_are_left_with_a_note(
    make: Callable[[], nn.Module], why: str
) -> None:
    torch.manual_seed(0)
    result = fxmerge.merge(make().eval(), torch.randn(4, 6), ratio=0.3, samples=64)
    assert {r.note for r in result.report.refitted if r.name in "ab"} == {why}
    assert why.split(": ")[1] in " ".join(result.report.text(width=300).split())


def test_runs_that_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxmerge.refit.joint.BUDGET", 1.0)
    torch.manual_seed(0)
    result = fxmerge.merge(Pyramid().eval(), torch.randn(2, 3, 8, 8), samples=64)
    assert {r.note for r in result.report.refitted if r.name.startswith("h")} == {COSTLY}


# Models on which refit used to fail


class Vectors(nn.Module):
    """A layer on a vector without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)).mean(0))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"budget": {"flops": 0.6}}, {"ratio": 0.5, "selection": "l2"}])
def test_layers_on_vectors_are_solved(options: Any) -> None:
    """64 vectors for a layer of 8 inputs: on them, the outputs are those of the original but for a little."""
    torch.manual_seed(0)
    model = Vectors().eval()
    batches = [torch.randn(5, 6) for _ in range(64)]
    result = fxmerge.merge(model, batches[0], calibration=batches, **options)
    plain = plain_merge(model, batches[0], **options | {"selection": "l2"})
    with torch.no_grad():
        one, other, before = ([m(x) for x in batches] for m in (model, result.module, plain.module))
    assert difference(one, other) < 0.65 * difference(one, before)


@pytest.mark.parametrize("factor", [1e12, 1e18])
@pytest.mark.parametrize("options", [{}, {"budget": {"params": 0.6}}])
def test_layers_whose_products_overflow_are_refitted(factor: float, options: Any) -> None:
    """The squares of 1e18 are beyond float32; the errors of all layers are measured, and they are lowered."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 4, 1, bias=False)).eval()
    x, batches = torch.randn(2, 3, 8, 8), [torch.randn(16, 3, 8, 8) for _ in range(4)]
    for i in (0, 2):
        model[i].weight.data.mul_(factor)
    options = options | {"decomposition": "prune"}
    found = fxmerge.merge(model, x, calibration=batches, **options).report
    plain = plain_merge(model, x, **options | {"selection": "l2"}).report.verdict.error
    assert found.verdict.error < 0.95 * plain
    assert [r.note for r in found.refitted] == [""] and found.refitted[0].after < found.refitted[0].before


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_makes_no_difference(made_inside: bool) -> None:
    def made() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return Vectors().eval(), torch.randn(5, 6)

    outside = fxmerge.merge(*made(), ratio=0.5, samples=64)
    given_ = made()
    with torch.inference_mode():
        inside = fxmerge.merge(*(made() if made_inside else given_), ratio=0.5, samples=64)
    for (name, one), (other_name, other) in zip(
        outside.module.named_parameters(), inside.module.named_parameters(), strict=True
    ):
        assert name == other_name and torch.equal(one, other) and not other.is_inference()
    assert inside.report.verdict == outside.report.verdict


def test_refit_none_contradicts_calibration() -> None:
    model, x = Vectors().eval(), torch.randn(5, 6)
    with pytest.raises(FxMergeError, match=r"refit='none' and calibration= contradict each other; give one"):
        fxmerge.merge(model, x, refit="none", calibration=[x])
    with pytest.raises(FxMergeError, match="contradict"):
        fxmerge.apply(Plan(Options(refit="none"), ()), model, x, [x])
    with pytest.raises(FxMergeError, match="contradict"):
        fxmerge.sweep(model, x, [0.5], calibration=[x], refit="none")


class Crossed(nn.Module):
    """Attention with the sequence first, between sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.i(x), self.i(y)
        return self.o(torch.relu(self.attention(x, y, y, need_weights=False)[0]))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_batches_in_the_shapes_of_an_exported_model_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    model = Crossed().eval()
    batches = [(torch.randn(7, 4, 6), torch.randn(9, 4, 6)) for _ in range(8)]
    errors = [
        fxmerge.merge(source, batches[0], calibration=batches, ratio=0.5).report.verdict.error
        for source in (model, torch.export.export(model, batches[0]))
    ]
    plain = plain_merge(model, batches[0], ratio=0.5, selection="l2").report.verdict.error
    assert max(errors) < 0.3 * plain
    wrong = [(torch.randn(7, 4, 6), torch.randn(5, 4, 6))] * 3
    with pytest.raises(FxMergeError, match=r"calibration"):
        fxmerge.merge(torch.export.export(model, batches[0]), batches[0], calibration=wrong)


# Errors that contradict each other


def test_a_last_layer_that_fits_and_a_model_that_does_not() -> None:
    def record(after: float, note: str = "") -> Refitted:
        return Refitted("head", 1.0, after, note)

    (note,) = contradiction([record(0.5), record(1e-4)], 0.9, 1)
    assert "head are within 0.01" in note and "off by 0.9" in note and "calibration=" in note
    assert contradiction([record(0.5), record(1e-4)], 0.9, 2) == ()  # one of two outputs is as far off
    assert contradiction([record(0.2)], 0.9, 1) == contradiction([record(1e-4)], 0.02, 1) == ()
    assert contradiction([record(0.0, "unchanged: the geometry of the call is unknown")], 0.9, 1) == ()
    assert contradiction([], 0.9, 1) == contradiction([record(1e-4)], float("nan"), 1) == ()


def test_the_report_says_where_refits_data_are_unlike_the_inputs() -> None:
    """Calibration on inputs close to 0, of which a hidden layer makes something else than of large ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)).eval()
    small = [1e-3 * torch.randn(64, 6) for _ in range(2)]
    found = fxmerge.merge(model, 30 * torch.randn(16, 6), ratio=0.7, calibration=small).report
    said = [note for note in found.notes if "contradict each other" in note]
    assert len(said) == 1 and said[0] in " ".join(found.text(width=600).split())
    alike = fxmerge.merge(model, torch.randn(16, 6), ratio=0.3, calibration=[torch.randn(200, 6)]).report
    assert alike.notes == ()
