"""Fitted probes, their number, and models that do not run on probes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration import batches, fit_probes
from fxmerge.calibration.batches import enough
from fxmerge.calibration.paired_run import Settings
from fxmerge.capture.capture_model import capture
from tests.helpers.netmaking import one_thread, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(rows=1000, seed=0, held=False, reduce=lambda value: value)


class Normed(nn.Module):
    """Two convolutions with BatchNorms, whose running statistics are those of other numbers than probes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        randomised(self, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.na(self.a(x)))
        return self.head(torch.relu(self.nb(self.b(h))).mean((2, 3)))


def gaussian_divergence(model: Normed, x: Tensor) -> float:
    """The divergence by torch.distributions: KL of Gaussians with the mean and variance of each BatchNorm's input."""
    found = []
    with torch.no_grad():
        for norm, h in ((model.na, model.a(x)), (model.nb, model.b(torch.relu(model.na(model.a(x)))))):
            flat = h.transpose(0, 1).flatten(1)
            here = torch.distributions.Normal(flat.mean(1), (flat.var(1, unbiased=False) + norm.eps).sqrt())
            trained = torch.distributions.Normal(norm.running_mean, (norm.running_var + norm.eps).sqrt())
            found.append(torch.distributions.kl_divergence(here, trained).mean())
    return float(sum(found) / len(found))


def given() -> tuple[Normed, Any, Any, Tensor]:
    model = Normed().double().eval()
    x = torch.randn(16, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    captured = capture(model, x[:2])
    return model, captured, provenance(captured), x


def test_the_divergence_is_that_of_gaussians() -> None:
    model, captured, facts, x = given()
    wanted = gaussian_divergence(model, x)
    assert fit_probes.mismatch(captured, facts, [[x]], SETTINGS) == pytest.approx(wanted, rel=1e-9)


def test_fitting_lowers_the_divergence_and_touches_nothing_else() -> None:
    model, captured, facts, x = given()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept, model.a.weight.requires_grad = x.clone(), False
    ((moved,),) = fit_probes.fitted(captured, facts, [[x]], SETTINGS)
    assert gaussian_divergence(model, moved) < gaussian_divergence(model, x) / 2
    assert torch.equal(x, kept) and not moved.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in (model.a.weight, model.b.weight)] == [False, True]
    assert torch.equal(moved, fit_probes.fitted(captured, facts, [[x]], SETTINGS)[0][0])


def test_probes_are_not_fitted_where_that_is_too_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    _, captured, facts, x = given()
    once = 3 * 16 * (2 * 36 * (27 * 8 + 72 * 6) + 2 * 6 * 4)  # FLOPs of a step, counted from the shapes
    monkeypatch.setattr(fit_probes, "BUDGET", fit_probes.LEAST * once - 1)
    assert fit_probes.fitted(captured, facts, [[x]], SETTINGS)[0][0] is x
    monkeypatch.setattr(fit_probes, "BUDGET", fit_probes.LEAST * once)
    assert fit_probes.fitted(captured, facts, [[x]], SETTINGS)[0][0] is not x


def test_without_statistics_or_a_gradient_probes_stay() -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    x = torch.randn(8, 4)
    captured = capture(plain, x)
    assert fit_probes.fitted(captured, provenance(captured), [[x]], SETTINGS)[0][0] is x
    _, captured, facts, images = given()
    with torch.inference_mode():
        frozen = images.clone()  # autograd refuses such a tensor, as an op without a gradient does
    broken = captured.module.get_submodule("a")
    broken.register_forward_pre_hook(lambda module, args: (args[0] * frozen[:1, :1, :1, :1],))
    assert fit_probes.fitted(captured, facts, [[images]], SETTINGS)[0][0] is images


@pytest.mark.parametrize(("forward", "count"), [(1e15, 4096), (5e11, 512), (0, 128)])
def test_fewer_probes_where_they_are_expensive(monkeypatch: pytest.MonkeyPatch, forward: float, count: int) -> None:
    _, captured, facts, _ = given()
    flops = 2 * 36 * (27 * 8 + 72 * 6) + 2 * 6 * 4
    monkeypatch.setattr(batches, "FORWARD", 512 * flops if forward == 5e11 else forward)
    assert enough(captured, facts) == count


class Picky(Normed):
    """Looks up numbers in a table that only inputs whose first number is close to 1/2 can index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.na(self.a(x))) + self.table(((x[:, 0, 0, 0] - 0.5).abs() * 1e6).long())[:, :, None, None]
        return self.head(torch.relu(self.nb(self.b(h))).mean((2, 3)))


class Rooted(Normed):
    """NaN for inputs whose first number is not 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + (-(x[:, :1, :1, :1] - 0.5).abs()).sqrt())


class Positive(Normed):
    """NaN for inputs with a negative number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sqrt())


@pytest.mark.parametrize(
    ("model", "why"), [(Picky(), r"fails \(IndexError: "), (Rooted(), "gives NaN or infinity")], ids=["picky", "rooted"]
)
def test_a_model_that_does_not_run_on_probes_is_merged_without_refit(model: nn.Module, why: str) -> None:
    x = torch.rand(2, 3, 6, 6) / 2 + 0.5
    x[:, 0, 0, 0] = 0.5
    result = fxmerge.merge(model.eval(), x, ratio=0.5)
    assert not result.report.refitted and result.plan.groups
    with pytest.raises(FxMergeError, match=rf"the model {why}.* on a calibration batch"):
        fxmerge.merge(model, x, ratio=0.5, calibration=[-x, x])
    text = result.report.text()
    assert "refit is left out, as the model " + why.replace("\\", "").split("(")[0].strip() in text
    assert "give merge(..., calibration=batches)" in " ".join(text.split())
    assert fxmerge.merge(model, x, ratio=0.5, calibration=[x]).report.handed_out is not None


def test_probes_stay_in_the_range_of_the_example() -> None:
    """They do after they have been fitted, too."""
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    records = fxmerge.merge(Positive().eval(), x, ratio=0.5, samples=128).report.refitted
    assert records and not any("not finite" in r.note for r in records)


class Overflowing(nn.Module):
    """Infinite intermediate values, finite outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        randomised(self, 2)
        with torch.no_grad():
            self.b.weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.relu(self.a(x)) * 1e38 * 10)
        return self.c(1 / (1 + h.abs()))


def test_layers_that_overflow_are_left_unchanged_and_the_report_says_so() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    result = fxmerge.merge(Overflowing().eval(), x, ratio=0.5, decomposition="prune")
    notes = {r.name: r.note for r in result.report.refitted}
    assert notes["b"] == "unchanged: its inputs or outputs are not finite"
    assert all(bool(torch.isfinite(v).all()) for v in result.module.state_dict().values())


def test_a_singular_system_is_solved() -> None:
    """Three samples for a layer of ten inputs, some of them equal: the ridge takes the nearest of many solutions."""
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    with torch.no_grad():
        model[0].weight[8:] = model[0].weight[:8]
        model[0].bias[8:] = model[0].bias[:8]
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = fxmerge.merge(model, x, calibration=[x.repeat(5, 1)], keep={"0": 10}, ratio=0.0)
    assert all(bool(torch.isfinite(v).all()) for v in result.module.state_dict().values())
    found = result.report.refitted
    assert found and all(r.after <= r.before for r in found)
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_recorded_model_is_refitted_on_runs_of_its_own_code() -> None:
    class Steered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Normed()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if float(x.sum()) > 0 else self.body(-x)

    result = fxmerge.merge(Steered().eval(), torch.rand(2, 3, 6, 6), ratio=0.5)
    assert result.report.refitted and "by the model's own code" in result.report.text()


def strayed() -> nn.Module:
    """Layers that shrink their inputs a thousandfold, and BatchNorms whose running statistics are the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential(*(
        part for _ in range(4) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ))  # fmt: skip
    for part in net:
        if isinstance(part, nn.Conv2d):
            part.weight.data *= 1e-3
    return net.eval()


def test_streams_are_held_only_where_the_running_statistics_are_right() -> None:
    x = torch.randn(8, 8, 6, 6)
    net = strayed()
    merged = fxmerge.merge(net, x, ratio=0.25, samples=64)
    assert any("probes run as they are" in note for note in merged.report.notes)
    assert merged.report.verdict.error < 1e-5  # 1e-4 if held, and far more in deeper networks
    trained = strayed()
    for part in trained:
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean over all batches
            part.reset_running_stats()
    trained.train()(fxmerge.PROBES["leaves"](x, 256, torch.Generator().manual_seed(9)))
    notes = fxmerge.merge(trained.eval(), x, ratio=0.25, samples=64).report.notes
    assert not any("probes run as they are" in note for note in notes)
