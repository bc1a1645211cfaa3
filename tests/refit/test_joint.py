"""Joint steps: nets whose best weights are known, gradients by differences, and cases that are left unchanged."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration.epilogue import affine
from fxmerge.calibration.patches import Form, by_position, form_of, positions, scaled_by_position
from fxmerge.calibration.rectifiers import Bounds
from fxmerge.refit import joint, solve
from fxmerge.refit.coordinates import Coordinates
from fxmerge.refit.joint_steps import JointSteps
from fxmerge.refit.layer_weights import LayerWeights
from fxmerge.refit.regions import Region
from fxmerge.refit.targets import Target
from tests.helpers.netmaking import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def merged(model: nn.Module, x: Tensor, **changes: Any) -> fxmerge.Result:
    given = {"ratio": 0.5, "scope": "internal", "decomposition": "prune", "selection": "l2", "calibration": [x]}
    return fxmerge.merge(model, x[:2], **given | changes)


def alone(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> fxmerge.Result:
    """The same merge without joint steps."""
    with monkeypatch.context() as patched:
        patched.setattr(joint, "BUDGET", 0.0)
        return merged(model, x, **changes)


def off(result: fxmerge.Result, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((result.module(x) - wanted).norm() / (wanted - wanted.mean(0)).norm())


class Narrow(nn.Module):
    """B A has rank 4, though A has 8 independent rows: 4 hidden channels are enough, but no 4 of A's rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 6)
        self.b.weight.data = torch.randn(6, 4) @ torch.randn(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def test_what_two_layers_can_do_together_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Narrow().double().eval(), torch.randn(2000, 12, dtype=F64)
    assert off(alone(model, x, monkeypatch), model, x) > 0.2  # layer by layer, A keeps its rows
    # the pull is towards the initial weights; without it nothing is lost
    monkeypatch.setattr(solve, "RIDGE", 1e-6)
    monkeypatch.setattr(joint, "STEPS", 60)
    result = merged(model, x)
    assert result.module.a.out_features == 4
    assert off(result, model, x) < 0.01


class Rectified(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n = nn.Conv2d(6, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.act, self.b, self.m = nn.ReLU(inplace), nn.Conv2d(16, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        for norm in (self.n, self.m):
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
            norm.running_mean.normal_()  # type: ignore[union-attr,operator]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.m(self.b(self.act(self.n(self.a(x))))) + x)


@pytest.mark.parametrize("inplace", [False, True])
def test_rectified_blocks_come_nearer(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Rectified(inplace).eval()
    x = torch.randn(32, 6, 12, 12, generator=torch.Generator().manual_seed(1))
    fresh = torch.randn(32, 6, 12, 12, generator=torch.Generator().manual_seed(2))
    before, after = alone(model, x, monkeypatch), merged(model, x)
    assert off(after, model, fresh) < 0.9 * off(before, model, fresh)
    assert not torch.equal(before.module.a.weight, after.module.a.weight)
    (record,) = after.report.refitted
    assert record.name == "b" and record.after < before.report.refitted[0].after
    assert all(p.requires_grad for p in after.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_to_single_layers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Narrow().to(dtype).eval(), torch.randn(200, 12).to(dtype)
    one, other = alone(model, x, monkeypatch), merged(model, x)
    assert torch.equal(one.module.a.weight, other.module.a.weight)


def test_steps_that_gain_little_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In comparison with all steps that gain anything; what a step must gain is a share of what is gained or left."""
    steps: list[int] = []
    slopes = joint._Joint._slopes

    def counted(one: joint._Joint) -> Any:
        steps[-1] += 1
        return slopes(one)

    monkeypatch.setattr(joint._Joint, "_slopes", counted)
    torch.manual_seed(0)
    model, x, fresh = Rectified().eval(), torch.randn(64, 6, 12, 12), torch.randn(64, 6, 12, 12)
    errors = []
    for gain in (0.0, 0.15):
        monkeypatch.setattr(joint, "GAIN", gain)
        steps.append(0)
        errors.append(off(merged(model, x), model, fresh))
    assert steps[1] < 0.8 * steps[0] and errors[0] < errors[1] < 1.1 * errors[0]


def test_few_positions_are_left_to_single_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 weights for each output and only 4 positions: they would be fitted to noise."""
    model, x = Narrow().double().eval(), torch.randn(4, 12, dtype=F64)
    one, other = alone(model, x, monkeypatch), merged(model, x)
    assert torch.equal(one.module.a.weight, other.module.a.weight)


class Cut(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.round(self.a(x)).detach())
        return out


def test_an_op_without_a_slope_is_left_to_single_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Cut().double().eval(), torch.randn(200, 12, dtype=F64)
    one, other = alone(model, x, monkeypatch), merged(model, x)
    assert torch.equal(one.module.a.weight, other.module.a.weight)


def place(groups: int, outs: int, width: int, bias: bool) -> LayerWeights:
    weight = nn.Parameter(torch.randn(groups * outs, width, dtype=F64))
    conv = Form(op="conv", kernel=(width,), stride=(1,), padding=((0, 0),), dilation=(1,), groups=groups)
    form = Form(op="linear") if groups == 1 else conv
    weight = weight if groups == 1 else nn.Parameter(weight.detach()[:, None])
    return LayerWeights(form, weight, nn.Parameter(torch.randn(groups * outs, dtype=F64)) if bias else None)


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (1, False), (3, True)])
def test_slopes_by_differences(groups: int, bias: bool) -> None:
    """The gradient that `slope` sets, against differences of an E that is computed here, with the pull as a trace."""
    torch.manual_seed(0)
    outs, width = 4, 5
    there = place(groups, outs, width, bias)
    rows = torch.randn(groups, 50, width, dtype=F64)
    mean, gram = rows.mean(1), (rows - rows.mean(1, keepdim=True)).mT @ (rows - rows.mean(1, keepdim=True)) / 50
    half = torch.randn(groups, outs, outs, dtype=F64)
    variable = Coordinates(there, mean, gram.clone(), half @ half.mT, 0.2)
    start, weights = variable.start.clone(), torch.randn(groups, outs, width, dtype=F64)
    by_bias = torch.randn(groups, outs, dtype=F64)
    about = gram if bias else gram + mean[:, :, None] * mean[:, None]
    level = about.diagonal(dim1=1, dim2=2).mean(1)

    def energy(at: Tensor) -> float:
        variable.at.data.copy_(at)
        variable.write()
        now = there.weight.detach().reshape(groups, outs, width)
        pull = sum(
            0.2 / 2 * level[g] * torch.einsum("op,oq,qp->", d, variable.square[g], d) for g, d in enumerate(now - start)
        )
        linear = (now * weights).sum()
        if there.bias is not None:
            linear = linear + (there.bias.detach().view(groups, outs) * by_bias).sum()
        return float(linear + pull)

    at = torch.randn_like(variable.at)
    energy(at)
    found = {id(there.weight): weights.reshape(there.weight.shape)}
    if there.bias is not None:
        found[id(there.bias)] = by_bias.flatten()
    variable.slope(found)
    slope = variable.at.grad
    assert slope is not None
    for _ in range(5):
        way = torch.randn_like(at)
        difference = (energy(at + 1e-5 * way) - energy(at - 1e-5 * way)) / 2e-5
        assert difference == pytest.approx(float((slope * way).sum()), rel=1e-5, abs=1e-6)


class Pooled(nn.Module):
    """A linear net; A has four output positions for each of B's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool, self.b = nn.Conv2d(6, 16, 1), nn.AvgPool2d(2), nn.Conv2d(16, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.pool(self.a(x)))
        return out


def test_the_energy_is_as_steep_along_all_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second differences of E and the pull along random directions of each layer's coordinates: 1 for white inputs,
    but 4 for the bias of A, which is the same at the four positions that are averaged.
    """
    found: list[float] = []

    def measured(one: joint._Joint, variables: list[Coordinates]) -> bool:
        def energy() -> float:
            for variable in variables:
                variable.write()
            total, _, slopes = one._slopes()
            return float(total + sum(variable.slope(slopes) for variable in variables))

        start = energy()
        for variable in variables:
            steep = []
            for _ in range(20):
                way = torch.randn_like(variable.at)
                sides = []
                for sign in (0.01, -0.01):
                    variable.at.data.copy_(sign * way)
                    sides.append(energy())
                variable.at.data.zero_()
                steep.append((sum(sides) - 2 * start) / float((0.01 * way).square().sum()))
            found.append(sum(steep) / len(steep))
        return False

    monkeypatch.setattr(joint._Joint, "_descend", measured)
    torch.manual_seed(0)
    merged(Pooled().double().eval(), torch.randn(256, 6, 8, 8, dtype=F64), ratio=0.25)
    assert found == pytest.approx([(6 * 1 + 4) / 7, 1.0], abs=0.1)


@pytest.mark.parametrize("gram", [-1.0, torch.inf])
def test_a_gram_without_a_root_is_left_to_single_layers(gram: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Narrow().double().eval(), torch.randn(200, 12, dtype=F64)
    one = alone(model, x, monkeypatch)

    def broken(rows: list[Tensor], reduce: Any) -> tuple[Tensor, Tensor]:
        width = rows[0].size(-1)
        return torch.zeros(1, width, dtype=F64), torch.full((1, width), gram, dtype=F64).diag_embed()

    monkeypatch.setattr(joint, "second_moments", broken)
    assert torch.equal(one.module.a.weight, merged(model, x).module.a.weight)


def test_what_a_region_keeps_goes_with_its_last_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a region is fitted, what earlier regions had read from outside is gone."""
    kept: list[set[str]] = []
    fit = JointSteps._fit

    def watched(steps: JointSteps, region: Region, ends: Any) -> bool:
        assert region.outside <= set(steps.paired.merged.values)
        live = set(steps.paired.merged.values)
        assert not any((earlier - region.outside) & live for earlier in kept)
        kept.append(set(region.outside))
        return fit(steps, region, ends)

    monkeypatch.setattr(JointSteps, "_fit", watched)
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Rectified() for _ in range(3))).eval()
    merged(blocks, torch.randn(32, 6, 12, 12))
    assert len(kept) == 3


def test_residuals_count_what_passes_the_rectifier() -> None:
    wanted, outputs = torch.tensor([[2.0, -1.0, -1.0]]), torch.tensor([[1.0, -3.0, 0.5]])

    def missed(bounds: Bounds | None) -> Tensor:
        step = affine(torch.ones(3), torch.zeros(3))
        return Target(outputs=wanted, axis=1, affine=step, bounds=bounds).residual()(outputs)

    torch.testing.assert_close(missed((0.0, inf)), torch.tensor([[-1.0, 0.0, 0.5]]))
    torch.testing.assert_close(missed((0.0, 1.5)), torch.tensor([[-0.5, 0.0, 0.5]]))
    torch.testing.assert_close(missed((-2.0, 0.5)), torch.tensor([[0.0, -2.0, 1.5]]))
    torch.testing.assert_close(missed(None), torch.tensor([[-1.0, -2.0, 1.5]]))


@pytest.mark.parametrize("bounds", [None, (0.0, inf), (0.0, 1.0), (-1.0, 1.0)])
def test_a_target_is_the_same_at_positions_and_everywhere(bounds: Bounds | None) -> None:
    """The residual of whole outputs is the gain times the error of sampled rows, where the gain is not small."""
    g = torch.Generator().manual_seed(0)
    y, found, before, now = (torch.randn(3, 4, 5, 6, generator=g, dtype=F64) for _ in range(4))
    step = affine(torch.rand(4, generator=g, dtype=F64) + 0.5, torch.randn(4, generator=g, dtype=F64))
    whole = Target(outputs=y, axis=1, affine=step, bounds=bounds, streams=(before, now))
    y_rows, found_rows, before_rows, now_rows = (t.movedim(1, -1).reshape(-1, 4) for t in (y, found, before, now))
    rows = Target(outputs=y_rows, axis=1, affine=step, bounds=bounds, streams=(before_rows, now_rows))
    apart = (found_rows - rows.given(found_rows)) * step.gain
    torch.testing.assert_close(whole.residual()(found).movedim(1, -1).reshape(-1, 4), apart)
    assert bool((apart == 0).any()) is (bounds is not None)


@pytest.mark.parametrize("bounds", [None, (0.0, inf), (0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("axis", [1, 3])
def test_the_slope_of_a_residual_is_the_gradient_of_its_square(bounds: Bounds | None, axis: int) -> None:
    g = torch.Generator().manual_seed(0)
    y, found, before, now = (torch.randn(3, 4, 5, 4, generator=g, dtype=F64) for _ in range(4))
    step = affine(torch.rand(4, generator=g, dtype=F64) + 0.5, torch.randn(4, generator=g, dtype=F64))
    residual = Target(outputs=y, axis=axis, affine=step, bounds=bounds, streams=(before, now)).residual()
    found.requires_grad_(True)
    missed = residual(found)
    (wanted,) = torch.autograd.grad(missed.square().sum() / 2, found)
    torch.testing.assert_close(residual.slope(missed.detach()), wanted)
    assert bool((wanted == 0).any()) is (bounds is not None)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv1d(5, 4, 3, groups=1), nn.Linear(6, 4)])
def test_positions_are_scaled_as_they_are_counted(layer: nn.Module) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*{nn.Conv2d: (2, 3, 5, 6), nn.Conv1d: (2, 5, 8), nn.Linear: (2, 7, 6)}[type(layer)], generator=g)
    analysis = fxmerge.analyze(nn.Sequential(layer), x)
    (found,) = analysis.facts.layers
    node = next(n for n in analysis.captured.module.graph.nodes if n.name == found.node)
    form = form_of(node, found, layer, layer.weight)
    assert form is not None
    out = layer(x).detach()
    factors = torch.rand(positions(out, form), generator=g)
    scaled = scaled_by_position(out, form, factors)
    assert scaled.shape == out.shape
    torch.testing.assert_close(by_position(scaled, form), by_position(out, form) * factors.square())


@pytest.mark.parametrize(
    ("flops", "count", "used"), [(0.0, 7, 7), (1e9, 7, 7), (joint.BUDGET / joint.PASSES / 3.5, 7, 3), (1e13, 7, 0)]
)
def test_batches_within_the_budget(flops: float, count: int, used: int) -> None:
    assert joint.affordable(flops, count, torch.device("cpu"), lambda t: t) == used
