"""Refit against independent solutions: torch.linalg.lstsq on unfolded patches, and nets whose solution is known."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxmerge
from fxmerge import FxMergeError, Options
from fxmerge.calibration import epilogue
from fxmerge.calibration.patches import at_positions, enough, form_of, matrices_of, patches, positions, weight_of
from fxmerge.ir.layer_ops import LayerOp
from fxmerge.ir.provenance import Layer
from fxmerge.methods.elimination import eliminate
from fxmerge.methods.evidence import Reading
from fxmerge.methods.least_squares import system
from fxmerge.refit import solve
from fxmerge.refit.targets import Target
from tests.helpers.netmaking import one_thread  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.slow import slow_but
from tests.helpers.two_processes import run_on_two

pytestmark = pytest.mark.usefixtures("one_thread")


def repaired(model: nn.Module, x: Any, options: Options | None = None, **changes: Any) -> fxmerge.Result:
    """A merge with refit, and with the selection that goes with it."""
    return fxmerge.merge(model, x, options, **{"refit": "synthetic", "selection": "repair"} | changes)


def alone(t: Tensor) -> Tensor:
    return t


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "linear": (nn.Linear(5, 4), (3, 5), "linear"),
    "linear on tokens": (nn.Linear(5, 4, bias=False), (3, 6, 5), "linear"),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9), "conv"),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(2, 1)), (2, 4, 8, 7), "conv"),
    "conv2d same": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 8, 7), "conv"),
    "conv2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6), "conv"),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 6, 6), "conv"),
    "conv2d one image": (nn.Conv2d(4, 6, 3), (4, 6, 6), "conv"),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6), "depthwise"),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 3), "conv"),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1), (2, 4, 5, 4), "conv_transpose"),
    "transposed dilated": (nn.ConvTranspose1d(4, 3, 2, 3, dilation=2), (2, 4, 5), "conv_transpose"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_a_product_of_patches(name: str) -> None:
    module, shape, op = LAYERS[name]
    module = copy.deepcopy(module).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight: Tensor = module.weight.detach()  # type: ignore[assignment,operator]
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    node = next(n for n in traced.graph.nodes if n.op == "call_module")
    form = form_of(node, Layer("0", "0", LayerOp(op), {"weight": "0.weight"}), module, weight)
    assert form is not None
    with torch.no_grad():
        out: Tensor = module(x)
    index = torch.arange(positions(out, form))
    product = torch.einsum("rgp,gop->rgo", patches(x, form, index), matrices_of(weight, form)).flatten(1)
    bias = module.bias if module.bias is not None else torch.zeros(product.size(1))
    torch.testing.assert_close(product + bias, at_positions(out, form, index))
    assert torch.equal(weight_of(matrices_of(weight, form), form, weight), weight)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("blocks", [1, 3])
def test_solve_is_ridge_regression(ridge: float, blocks: int) -> None:
    """Against lstsq on rows with the pull's own rows added below."""
    g = torch.Generator().manual_seed(blocks)
    rows = torch.randn(60, blocks, 5, generator=g, dtype=torch.float64) + 0.5
    goal = torch.randn(60, blocks, 4, generator=g, dtype=torch.float64)
    start = torch.randn(blocks, 4, 5, generator=g, dtype=torch.float64)
    normal = system([rows[:25], rows[25:]], [goal[:25], goal[25:]], alone)
    found = normal.solve(start, normal.lifted(ridge))
    for b in range(blocks):
        p, t = rows[:, b] - rows[:, b].mean(0), goal[:, b] - goal[:, b].mean(0)
        pull = (ridge * p.square().mean(0).mean() * 60) ** 0.5 * torch.eye(5, dtype=torch.float64)
        by_rows = torch.linalg.lstsq(torch.cat([p, pull]), torch.cat([t, pull @ start[b].T])).solution.T
        torch.testing.assert_close(found[b], by_rows)
    out = torch.einsum("rgp,gop->rgo", rows, found) + normal.intercept(found, normal.mean_t)
    torch.testing.assert_close(out.mean(0), goal.mean(0))
    torch.testing.assert_close(out.var(0, correction=0), normal.variance(found))


class Two(nn.Module):
    """A hidden layer whose units 4 to 7 are linear combinations of units 0 to 3: half can be removed without loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        with torch.no_grad():
            mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
            self.a.weight[4:], self.a.bias[4:] = mix @ self.a.weight[:4], mix @ self.a.bias[:4]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


@pytest.mark.parametrize("source", ["synthetic", "calibration"])
def test_redundant_channels_are_removed_without_loss(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "RIDGE", 1e-6)
    torch.manual_seed(0)
    model, x = Two().double().eval(), torch.randn(300, 6, dtype=torch.float64)
    more: dict[str, Any] = {"calibration": [x]} if source == "calibration" else {}
    result = repaired(model, x[:2], ratio=0.5, decomposition="prune", **more)
    assert result.module.a.out_features == 4
    with torch.no_grad():
        pruned = repaired(model, x[:2], refit="none", decomposition="prune")
        off, plain = result.module(x) - model(x), pruned.module(x) - model(x)
    assert off.abs().max() < 1e-2
    assert off.norm() < 0.02 * plain.norm()
    (record,) = result.report.refitted
    assert record.name == "b"
    assert record.after < 1e-4 < record.before


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_refit_runs_on_every_net_and_lowers_each_error(name: str) -> None:
    model, x = NETS[name]()
    result = repaired(model, x, samples=64)
    assert all(torch.isfinite(p).all() for p in result.module.parameters())
    assert all(r.after <= r.before for r in result.report.refitted), result.report.refitted
    result.module.graph.lint()
    with torch.no_grad():
        result.module(x)


@pytest.mark.parametrize("name", NETS)
def test_ratio_0_changes_no_bit(name: str) -> None:
    model, x = NETS[name]()
    result = repaired(model, x, ratio=0.0)
    before, after = model.state_dict(), result.module.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.slow
def test_an_exact_merge_stays_exact() -> None:
    """Dead channels are removed: no layer changes by more than rounding errors."""
    model, x = NETS["chain_2d"]()
    with torch.no_grad():
        model.n.weight[::2] = 0
        model.n.bias[::2] = -1
        before = model(x)
        result = repaired(model, x, keep={"a": 0.5}, ratio=0.0, decomposition="prune")
        assert [r.note for r in result.report.refitted][:1] == ["unchanged: exact"]
        torch.testing.assert_close(result.module(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(["mlp", "words"], ["residual", "mlp", "encoder", "words"]))
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    model, x = NETS[name]()
    one, two, other = (repaired(model, x, samples=64, seed=s).module.state_dict() for s in (3, 3, 4))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert any(v.shape != other[k].shape or not torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model, x = NETS["residual"]()
    module = repaired(model.to(dtype), x.to(dtype), samples=64).module
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in module.parameters())


def test_the_callers_model_and_flags_are_left_alone() -> None:
    model, x = NETS["residual"]()
    model.train()
    before = copy.deepcopy(model.state_dict())
    module = repaired(model, x, samples=64).module
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert module.training


def once(batches: list[Any]) -> Iterator[Any]:
    yield from batches


X = torch.randn(48, 12, generator=torch.Generator().manual_seed(0))
FEEDS: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: X,
    "tensors": lambda: list(X.split(16)),
    "a generator": lambda: once(list(X.split(16))),
    "with labels": lambda: [(x, torch.zeros(16)) for x in X.split(16)],
    "dicts": lambda: [{"x": x, "label": 3} for x in X.split(16)],
    "a DataLoader": lambda: DataLoader(TensorDataset(X, torch.zeros(48)), batch_size=16),
}


@pytest.mark.parametrize("name", FEEDS)
def test_calibration_in_every_form_is_the_same(name: str) -> None:
    model, x = NETS["mlp"]()
    want = repaired(model, x, calibration=list(X.split(16))).module.state_dict()
    found = repaired(model, x, calibration=FEEDS[name]()).module.state_dict()
    for k, v in want.items():
        torch.testing.assert_close(found[k], v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batches", "message"), [
    ([], "no batches"), (3, "is of type int"), ([{"y": X}], "has no x"), ([X[0]], "where the example inputs have"),
    ([()], "tuple of 0"), ([X[:0]], "no samples"),
])  # fmt: skip
def test_invalid_calibration_data_is_refused(batches: Any, message: str) -> None:
    with pytest.raises(FxMergeError, match=message):
        repaired(*NETS["mlp"](), calibration=batches)


def test_calibration_must_be_given() -> None:
    with pytest.raises(FxMergeError, match="calibration=batches"):
        repaired(*NETS["mlp"](), refit="calibration")


@pytest.mark.slow
def test_refit_beats_merging_on_the_callers_data() -> None:
    model, x = NETS["residual"]()
    data = torch.randn(256, *x.shape[1:], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        goal = model(data)
        errors = {}
        for how in ("none", "synthetic", "calibration"):
            given = {"calibration": [data[:128]]} if how == "calibration" else {}
            module = repaired(model, x, refit=how, scope="internal", **given).module
            errors[how] = float((module(data) - goal).square().mean())
    assert errors["calibration"] < 0.5 * errors["none"], errors


def test_elimination_is_the_best_of_all_subsets_where_channels_do_not_interact() -> None:
    g = torch.Generator().manual_seed(0)
    gram = torch.diag(torch.rand(6, generator=g, dtype=torch.float64) + 0.1)
    weight = torch.randn(3, 6, generator=g, dtype=torch.float64)
    reading = Reading(gram, weight, torch.arange(6), torch.arange(6)[:, None])
    found = eliminate([reading], torch.arange(6), 3).tolist()
    cost = (weight.square().sum(0) * gram.diagonal()).tolist()
    best = max(itertools.combinations(range(6), 3), key=lambda kept: sum(cost[i] for i in kept))
    assert found == list(best)


def test_elimination_follows_re_solving() -> None:
    """The first channel removed is the one with the least loss after lstsq, found by a loop over all channels."""
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(400, 8, generator=g, dtype=torch.float64) @ torch.randn(8, 8, generator=g, dtype=torch.float64)
    rows = rows - rows.mean(0)
    weight = torch.randn(4, 8, generator=g, dtype=torch.float64)
    columns = torch.arange(8).view(4, 2)  # two columns a channel
    losses = []
    for gone in range(4):
        stay = [c for c in range(8) if c not in columns[gone].tolist()]
        solved = torch.linalg.lstsq(rows[:, stay], rows @ weight.T).solution
        losses.append(float((rows[:, stay] @ solved - rows @ weight.T).square().sum()))
    reading = Reading(rows.T @ rows / 400, weight, torch.arange(4), columns)
    left = eliminate([reading], torch.arange(4), 3).tolist()
    assert set(range(4)) - set(left) == {losses.index(min(losses))}


def test_a_shared_weight_is_left_and_the_report_says_so() -> None:
    model, x = NETS["twice"]()
    records = {r.name: r.note for r in repaired(model, x).report.refitted}
    assert "one weight serves several calls" in records["twice"]
    assert records["b"] == ""


def test_layers_without_a_bias_get_one() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)).eval()
    module = repaired(net, torch.randn(2, 6)).module
    assert module.get_submodule("2").bias is not None
    model, x = NETS["functional"]()
    merged = repaired(model, x, samples=64).module
    assert any(name.endswith("w2_bias") for name, _ in merged.named_parameters())


def test_settings_bound_the_rows() -> None:
    model, x = NETS["residual"]()
    few = repaired(model, x, Options(samples=8, rows=64, batch=4))
    assert all(torch.isfinite(p).all() for p in few.module.parameters())


@pytest.mark.parametrize(
    ("rows", "width", "count"), [(65536, 9, 65536), (65536, 576, 2**24 // 576), (65536, 4608, 16384), (64, 4608, 64)]
)
def test_wide_layers_are_solved_on_fewer_rows(rows: int, width: int, count: int) -> None:
    assert enough(rows, width) == count


@pytest.mark.slow
def test_two_processes_compute_the_weights_of_one(tmp_path: Path) -> None:
    """torchrun, gloo: the same bits on both ranks, and nearly those of one process, which estimates the number of
    independent rows from other blocks.
    """
    run_on_two("distributed_refit.py", tmp_path)
    model, x = NETS["residual"]()
    data = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(7))
    for name, given in (("synthetic", None), ("calibration", list(data.split(16)))):
        one, other = (load_file(tmp_path / f"{name}{rank}.safetensors") for rank in range(2))
        alone = repaired(model, x, samples=64, batch=16, rows=10**6, calibration=given).module.state_dict()
        assert set(one) == set(alone)
        for key, value in alone.items():
            assert torch.equal(one[key], other[key])
            torch.testing.assert_close(one[key], value, rtol=1e-2, atol=1e-3)


def test_nearly_constant_inputs_do_not_stop_selection() -> None:
    """Second moments about a mean that is far larger are rounding errors: symmetric, but with negative eigenvalues."""
    noise = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = (noise + noise.T) * 1e-18
    assert float(torch.linalg.eigvalsh(gram)[0]) < 0
    reading = Reading(gram, torch.randn(5, 12), torch.arange(12), torch.arange(12)[:, None])
    assert len(eliminate([reading], torch.arange(12), 7)) == 7


def test_before_a_rectifier_the_solution_is_close_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that the rectifier stops need not be met; scipy minimises this loss, convex in weight and bias."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2000, 1, 12, generator=generator, dtype=torch.float64)
    t = torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    t += p[:, 0] @ torch.randn(12, 5, generator=generator, dtype=torch.float64) / 3 - 0.5
    ones = torch.ones(5, dtype=torch.float64)
    step = epilogue.affine(2 * ones, 0.3 * ones)

    def rows(rectified: bool) -> solve.Rows:
        target = Target(outputs=t, axis=1, affine=step, bounds=(0.0, inf) if rectified else None)
        return solve.Rows([p], [target], [torch.arange(len(p)) % 4 + 4])

    def loss(flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        leaf = torch.from_numpy(flat).requires_grad_()
        found = p[:, 0] @ leaf[5:].view(5, 12).T + leaf[:5]
        apart = torch.where(2 * t + 0.3 > 0, found - t, (found + 0.15).clamp(min=0))
        value = apart.square().sum()
        value.backward()
        return value.item(), leaf.grad.numpy()  # type: ignore[union-attr]

    best = scipy.optimize.minimize(loss, np.zeros(65), jac=True, method="L-BFGS-B", options={"gtol": 1e-9}).fun

    def reached(rectified: bool) -> float:
        start = torch.zeros(1, 5, 12, dtype=torch.float64)
        given = rows(rectified)
        bias, solved = torch.zeros(1, 5, dtype=torch.float64), lambda _: given
        monkeypatch.setattr(solve.Rows, "solved", property(solved))  # all rows are solved on
        found = solve.Problem(rows=given, start=start, bias=bias, wanted=None, centred=True, reduce=alone).best()
        return solve.error(rows(True), found.weight, found.bias, alone) / best

    assert 1 <= reached(True) < 1.01 and reached(False) > 1.1


class FunctionalLayers(nn.Module):
    """Layers that are function calls without a bias, traced by torch.fx."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(32, 16) / 4)
        self.b = nn.Parameter(torch.randn(32, 32) / 6)
        self.c = nn.Parameter(torch.randn(8, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        relu, linear = nn.functional.relu, nn.functional.linear
        return linear(relu(linear(relu(linear(x, self.a)), self.b)), self.c)


class ExportedLayers(nn.Module):
    """A loop over a size, so that torch.export captures it: each layer becomes a function call."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 32, bias=False)
        self.b, self.c = nn.Linear(32, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[-1] // 16):
            x = nn.functional.relu(self.a(x))
        out: Tensor = self.c(nn.functional.relu(self.b(x)))
        return out


@pytest.mark.parametrize("make", [FunctionalLayers, ExportedLayers])
def test_biases_that_refit_adds_are_in_the_code_that_runs(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batches = [torch.randn(64, 16) for _ in range(8)]
    result = fxmerge.merge(model, torch.randn(64, 16), ratio=0.5, calibration=batches)
    x = torch.randn(64, 16)
    assert isinstance(result.module, torch.fx.GraphModule)
    added = [n for n in result.module.graph.nodes if n.op == "get_attr" and "bias" in str(n.target)]
    assert added  # otherwise this test shows nothing
    with torch.no_grad():
        of_graph = torch.fx.Interpreter(result.module).run(x)
        torch.testing.assert_close(result.module(x), of_graph, rtol=0, atol=0)
        result.save(tmp_path / "saved")
        torch.testing.assert_close(fxmerge.load(tmp_path / "saved")(x), of_graph)


Product = Callable[[Tensor, Tensor, Tensor], Tensor]
PRODUCTS: dict[str, tuple[Product, Product]] = {
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), nn.functional.linear),
    "addmm by name": (lambda x, w, b: torch.addmm(mat1=x, mat2=w, input=b), nn.functional.linear),
    "addmm of the bias": (lambda x, w, b: b.addmm(x, w), nn.functional.linear),
    "aten addmm": (lambda x, w, b: torch.ops.aten.addmm.default(b, x, w), nn.functional.linear),
    "tensordot by name": (lambda x, w, b: torch.tensordot(a=x, b=w, dims=1) + b, lambda x, w, b: x @ w + b),
}


class Products(nn.Module):
    """Two layers around a product of x (n, 16), a weight, and b (24,)."""

    def __init__(self, product: Product, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(24, 4)
        self.weight, self.bias, self.product = nn.Parameter(weight), nn.Parameter(bias), product

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(torch.tanh(self.first(x)), self.weight, self.bias)
        out: Tensor = self.last(torch.tanh(y))
        return out


@pytest.mark.parametrize("name", PRODUCTS)
def test_all_spellings_of_a_product_are_refitted_alike(name: str) -> None:
    """The twin computes the same function: the same channels stay, with the same repairs."""
    torch.manual_seed(0)
    (product, of_twin), weight = PRODUCTS[name], torch.randn(16, 24) / 4
    model = Products(product, weight, torch.randn(24)).eval().double()
    weight = weight.T.contiguous() if of_twin is nn.functional.linear else weight
    twin = Products(of_twin, weight, torch.zeros(24)).eval().double()
    twin.load_state_dict(model.state_dict() | {"weight": weight.double()})
    batches, x = [torch.randn(64, 12).double() for _ in range(4)], torch.randn(8, 12).double()
    one, other = (repaired(m, x, refit="calibration", calibration=batches) for m in (model, twin))
    assert len(one.plan.groups) == 2
    assert [p.kept for p in one.plan.groups] == [p.kept for p in other.plan.groups]
    y = torch.randn(32, 12).double()
    torch.testing.assert_close(one.module(y), other.module(y), rtol=1e-6, atol=1e-6)
