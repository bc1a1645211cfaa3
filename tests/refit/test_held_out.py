"""Samples held out of the solves: what is not better on others is not taken, and no result is worse than pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration.held_out import HELD_OUT, NO_FOLD, position_folds, sample_folds
from fxmerge.calibration.patches import Form
from fxmerge.refit import handed_out, joint, solve
from fxmerge.refit.records import NO_BETTER, TOO_FEW
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401


def mixed(seed: int, n: int, width: int = 64) -> Tensor:
    """Correlated features."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=g) @ torch.randn(8, width, generator=torch.Generator().manual_seed(99)) + (
        0.3 * torch.randn(n, width, generator=g)
    )


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.a(x)))
        return out


def off(model: nn.Module, result: fxmerge.Result, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((result.module(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("count", [16, 24, 48, 200])
def test_a_solve_on_few_rows_does_not_get_worse_on_others(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """72 inputs of the last layer and fewer samples: a solve reaches an error of 0 on them, and fits noise."""
    monkeypatch.setattr(handed_out, "output_error", lambda *_, **__: 0.0)  # so that the refitted model is handed out
    torch.manual_seed(1)
    model, other, x = Classifier().eval(), torch.randn(2000, 64), torch.randn(count, 64)
    options: dict[str, Any] = {"ratio": 0.25, "selection": "l2", "decomposition": "prune"}
    result = fxmerge.merge(model, x[:2], calibration=[x], samples=1, **options)
    assert off(model, result, other) <= off(model, plain_merge(model, x[:2], **options), other) * 1.02


def test_reported_errors_are_those_on_other_samples() -> None:
    model = Classifier().eval()
    options: dict[str, Any] = {"ratio": 0.25, "selection": "l2", "decomposition": "prune", "samples": 1}
    result = fxmerge.merge(model, mixed(1, 2), calibration=[mixed(2, 200)], **options)
    (record,) = result.report.refitted
    assert record.after**0.5 == pytest.approx(off(model, result, mixed(7, 2000)), rel=0.35)
    assert record.after**0.5 > 1.3 * off(model, result, mixed(2, 200)[torch.arange(200) % 8 != 7])


def test_one_in_eight_is_held_out_and_not_many_more_than_32() -> None:
    folds = sample_folds([10, 30, 24])
    assert (torch.cat(folds) == HELD_OUT).nonzero().flatten().tolist() == [7, 15, 23, 31, 39, 47, 55, 63]
    assert torch.bincount(torch.cat(folds)).tolist() == [8] * 8
    assert [len(f) for f in folds] == [10, 30, 24]
    many = torch.bincount(torch.cat(sample_folds([500] * 4)))
    assert 32 <= int(many[HELD_OUT]) <= 33 and int(many[:HELD_OUT].min()) > 250
    assert (torch.cat(sample_folds([15])) == NO_FOLD).all()
    made = sample_folds([20, 20, 50], made=2)
    assert int((torch.cat(made[:2]) == HELD_OUT).sum()) == 5 and (made[2] == NO_FOLD).all()


def test_whole_samples_are_held_out() -> None:
    """Of images, sequences, and windows that a batch is cut into; or the last positions of each, of few samples."""
    conv = Form(op="conv", kernel=(3, 3))
    samples = sample_folds([16])
    (images,) = position_folds([torch.zeros(16, 4, 5, 6)], conv, [torch.arange(16 * 30)], samples)
    images = images == HELD_OUT
    assert images.view(16, 30).all(1).nonzero().flatten().tolist() == [7, 15]
    assert int(images.sum()) == 60
    linear = Form(op="linear")
    (windows,) = position_folds([torch.zeros(64, 9, 4)], linear, [torch.arange(64 * 9)], samples)
    assert (windows == HELD_OUT).view(16, 36).all(1).nonzero().flatten().tolist() == [7, 15]
    (few,) = position_folds([torch.zeros(2, 40, 4)], linear, [torch.arange(80)], sample_folds([2]))
    assert (few == HELD_OUT).nonzero().flatten().tolist() == list(range(70, 80))


def test_a_layer_with_too_few_rows_keeps_its_weights() -> None:
    model, x = Classifier().eval(), mixed(1, 4)
    result = fxmerge.merge(model, x, calibration=[x], samples=1, ratio=0.25, selection="l2", decomposition="prune")
    assert [r.note for r in result.report.refitted] == [TOO_FEW]


@pytest.mark.parametrize("broken", [-30.0, 0.0])
def test_what_refit_spoils_is_not_handed_out(broken: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that returns nonsense, and judges itself by it: the model before refit is handed out, and it says so."""
    best = solve.Problem.best

    def nonsense(problem: solve.Problem) -> solve.Solution:
        found = best(problem)
        return solve.Solution(found.weight * broken, found.bias, found.ridge, 1.0, 0.0)

    monkeypatch.setattr(solve.Problem, "best", nonsense)
    monkeypatch.setattr(joint, "BUDGET", 0.0)
    model, x = Classifier().eval(), mixed(1, 64)
    options: dict[str, Any] = {"ratio": 0.25, "selection": "l2", "decomposition": "prune"}
    result = fxmerge.merge(model, x, calibration=[x], samples=1, **options)
    plain = plain_merge(model, x, **options)
    assert off(model, result, x) == pytest.approx(off(model, plain, x), rel=1e-4)
    found = result.report.handed_out
    assert found is not None and found.name == handed_out.MERGED and not result.report.refitted
    text = " ".join(result.report.text().split())
    assert "handed out: merged without refit" in text


def test_candidates_are_run_on_the_samples_held_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """But on whole batches where few of them would have to hold the streams."""
    seen: list[list[int]] = []
    found = handed_out.output_error

    def watched(pair: Any, batches: Any, settings: Any, judges: Any) -> float:
        seen.append([len(batch[0]) for batch in batches])
        assert [len(some) for some in judges] == seen[-1]
        return found(pair, batches, settings, judges)

    monkeypatch.setattr(handed_out, "output_error", watched)
    model, x = Classifier().eval(), mixed(1, 64)
    options: dict[str, Any] = {"ratio": 0.25, "scope": "all", "batch": 64}
    fxmerge.merge(model, x[:2], calibration=[x, mixed(2, 64)], samples=1, **options)
    fxmerge.merge(model, x[:2], samples=256, **options)
    fxmerge.merge(model, x[:2], samples=128, **options)
    assert [*map(list, dict.fromkeys(map(tuple, seen)))] == [[8, 8], [8, 8, 8, 8], [64, 64]]


def test_candidates_are_run_on_whole_batches_if_the_model_takes_no_others() -> None:
    """Its code refuses batches of as many samples as are held out of one."""

    class Refuses(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.size(0) != 8, "not 8")
            return super().forward(x)

    model, x = Refuses().eval(), mixed(1, 64)
    found = fxmerge.merge(model, x[:2], ratio=0.25, scope="all", calibration=[x], samples=1).report.handed_out
    assert found is not None and len(found.errors) == 3


def test_a_bad_start_is_not_handed_out() -> None:
    """The published scale takes partners of a small cosine at |w_i| / |w_j|: here pruning is better, and is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).eval()
    with torch.no_grad():
        model[0].weight[:48] *= 30.0  # loud rows, which the quiet ones are scaled up or down from
        model[2].weight[:, :48] /= 30.0
    x = mixed(1, 64)
    options: dict[str, Any] = {"ratio": 0.5, "selection": "l2", "threshold": 0.0, "decomposition": "mostsim"}
    result = fxmerge.merge(model, x, calibration=[x], samples=1, **options)
    plain = [plain_merge(model, x, **options | {"decomposition": name}) for name in ("prune", "mostsim")]
    best = min(off(model, one, mixed(7, 2000)) for one in plain)
    assert off(model, result, mixed(7, 2000)) <= best * 1.05


def test_a_layer_ends_one_chain_and_begins_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain chains each pair is fitted jointly: every layer but the first and the last takes part twice."""
    fitted: list[list[str]] = []
    fit = joint.fit

    def watched(run: Any, chain: Any, *args: Any, **kwargs: Any) -> bool:
        fitted.append([layer.module for layer in chain.layers])
        return bool(fit(run, chain, *args, **kwargs))

    monkeypatch.setattr(joint, "fit", watched)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3), nn.ReLU6(), nn.Conv2d(12, 12, 3), nn.ReLU6(), nn.Conv2d(12, 12, 3), nn.ReLU6()]
    model = nn.Sequential(*layers, nn.Conv2d(12, 4, 1)).eval()
    x = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    result = fxmerge.merge(model, x[:2], calibration=[x], ratio=0.25, samples=1)
    assert fitted == [["0", "2"], ["2", "4"], ["4", "6"]]
    assert NO_BETTER not in {r.note for r in result.report.refitted}


@pytest.mark.parametrize(("far", "name"), [(1.1, handed_out.MERGED), (0.9, handed_out.REFITTED)])
def test_what_is_far_off_as_it_runs_is_not_handed_out(far: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On probes, refit runs BatchNorms with the statistics of the probes; what is handed out has its own.

    far: the refitted model's error with its own statistics, where the least is 0.5
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 5, 3))
    for _ in range(40):  # the statistics of such inputs
        model(torch.randn(16, 3, 12, 12))
    as_refit_runs, as_it_runs = iter([0.3, 0.1, 0.4]), iter([0.5, far, 0.8])  # merged, refitted, pruned
    found = {True: as_refit_runs, False: as_it_runs}
    monkeypatch.setattr(handed_out, "output_error", lambda _, __, settings, ___: next(found[settings.held]) ** 2)
    report = fxmerge.merge(model.eval(), torch.randn(2, 3, 12, 12), ratio=0.25, samples=64).report
    handed = report.handed_out
    assert handed is not None and handed.name == name and bool(report.refitted) == (name == handed_out.REFITTED)
    errors = [far, 0.5, 0.8] if name == handed_out.MERGED else [0.1, 0.3, 0.4]
    names = (handed_out.REFITTED, handed_out.MERGED, handed_out.PRUNED)
    assert [handed.errors[n] for n in names] == pytest.approx(errors)


@pytest.mark.parametrize(
    ("between", "run"), [([nn.GELU()], {8}), ([nn.ReLU()], {64})]
)
def test_models_are_compared_on_the_probes_held_out(
    between: list[nn.Module], run: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all 64 only where rectified layers are held by the statistics of as many."""
    model = nn.Sequential(nn.Linear(8, 16), *between, nn.Linear(16, 4)).eval()
    found, counts = handed_out.output_error, set()

    def counted(pair: Any, batches: Any, *rest: Any) -> float:
        counts.add(sum(len(batch[0]) for batch in batches))
        return found(pair, batches, *rest)

    monkeypatch.setattr(handed_out, "output_error", counted)
    fxmerge.merge(model, torch.randn(2, 8), ratio=0.25, samples=64)
    assert counts == run
