"""Components of residual streams: rotations pass norms, LayerScale, class tokens and positions (SliceGPT, 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration.paired_run import PairedRun
from fxmerge.options import Options
from fxmerge.pipeline import prepared
from fxmerge.progress import silent
from fxmerge.rewrite.rotate import rotated
from tests.helpers.netmaking import Net, one_thread, plain_merge  # noqa: F401
from tests.helpers.rotation import drawn, rotation_errors
from tests.helpers.small_llama import LENGTH, WORDS, Llama

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, RANK, CLASSES = 24, 7, 9
NAME = "patch"
NORMS = ("layer", "rms", "written out")


class WrittenOut(nn.Module):
    """RMSNorm as in transformers' Llama."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x


def norm(kind: str) -> nn.Module:
    made = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
    return WrittenOut(1e-12) if kind == "written out" else made[kind](WIDTH, eps=1e-12)


class Stream(nn.Module):
    """Positions and a class token, two pre-norm blocks with or without LayerScale, and a head."""

    def __init__(self, kind: str, *, scaled: bool = True, rank: int = WIDTH) -> None:
        super().__init__()
        self.joins = kind != "written out"  # means over channels where rows differ are not followed
        torch.manual_seed(0)
        self.patch = nn.Linear(10, WIDTH)
        self.token, self.places = nn.Parameter(torch.empty(1, 1, WIDTH)), nn.Parameter(torch.empty(1, 7, WIDTH))
        self.norms = nn.ModuleList(norm(kind) for _ in range(3))
        self.inner = nn.ModuleList(nn.Linear(WIDTH, 16, bias=kind == "layer") for _ in range(2))
        self.outer = nn.ModuleList(nn.Linear(16, WIDTH) for _ in range(2))
        self.scales = nn.ParameterList(torch.rand(WIDTH) + 0.5 for _ in range(2)) if scaled else [1.0, 1.0]
        self.head = nn.Linear(2 * WIDTH, CLASSES)
        for own in self.norms:
            nn.init.uniform_(own.weight, 0.5, 2.0)
            nn.init.normal_(own.bias) if kind == "layer" else None
        basis = torch.linalg.qr(torch.randn(WIDTH, rank))[0]
        with torch.no_grad():
            written = [self.patch.weight, self.patch.bias, self.token, self.places]
            for value in (*written, *(p for layer in self.outer for p in (layer.weight, layer.bias))):
                channels_first = value.T if value.shape[-1] == WIDTH else value
                drawn = torch.tensordot(basis, torch.randn(rank, *channels_first.shape[1:]), 1)
                value.copy_(drawn.T if value.shape[-1] == WIDTH else drawn)
            for layer, scale in zip(self.outer, self.scales, strict=True):
                layer.weight.div_(scale[:, None] if scaled else 1.0)
                layer.bias.div_(scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x) + self.places
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) if self.joins else x
        for own, inner, outer, scale in zip(self.norms, self.inner, self.outer, self.scales, strict=False):
            x = x + F.dropout(outer(torch.tanh(inner(own(x)))), 0.1, False) * scale
        x = self.norms[2](x)
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))  # type: ignore[no-any-return]


def stream(kind: str, **more: Any) -> nn.Module:
    return Stream(kind, **more).double().eval()


def inputs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 7, 10, generator=torch.Generator().manual_seed(seed)).double()


def off(module: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((module(x) - model(x)).norm() / model(x).norm())


def only(count: int) -> dict[str, Any]:
    """Only the stream narrows."""
    return {"keep": {NAME: count, "inner.0": 1.0, "inner.1": 1.0}, "scope": "all"}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_any_rotation_passes(kind: str, scaled: bool) -> None:
    found = fxmerge.analyze(stream(kind, scaled=scaled), inputs(4), scope="all")
    assert rotation_errors(found)[NAME] < 1e-12


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_a_stream_of_low_rank_loses_nothing(kind: str, scaled: bool) -> None:
    """All that is written into it lies in 7 dimensions; a LayerNorm takes one place more, for the mean."""
    model, count = stream(kind, scaled=scaled, rank=RANK), RANK + (kind == "layer")
    for more in ({"refit": "none"}, {"calibration": [inputs(64)]}):
        for decomposition in ("pca", "auto"):
            result = fxmerge.merge(model, inputs(8), decomposition=decomposition, **only(count), **more)
            (plan,) = (g for g in result.plan.groups if g.name == NAME)
            assert len(plan.kept) == count and plan.components == pytest.approx(1)
            assert off(result.module, model, inputs(16, 2)) < 1e-6
    assert isinstance(result.model, Stream) and result.model.norms[0].weight.shape == (count,)
    assert off(result.model, model, inputs(16, 2)) < 1e-6
    less = fxmerge.merge(model, inputs(8), decomposition="pca", refit="none", **only(count - 1))
    assert off(less.module, model, inputs(16, 2)) > 1e-3


@pytest.mark.parametrize("kind", NORMS)
def test_components_lose_less_than_channels(kind: str) -> None:
    model, errors = stream(kind), {}
    for name in ("pca", "auto", "lstsq"):
        plain, solved = (
            fxmerge.merge(model, inputs(8), decomposition=name, **only(12), **more)
            for more in ({"refit": "none"}, {"calibration": [inputs(128)]})
        )
        errors[name] = off(plain.module, model, inputs(32, 2)), off(solved.module, model, inputs(32, 2))
    assert errors["pca"] == errors["auto"]
    assert errors["pca"][0] < 0.9 * errors["lstsq"][0] and errors["pca"][1] < 0.9 * errors["lstsq"][1], errors


def test_a_language_model_whose_head_is_not_tied() -> None:
    """An embedding writes the stream, attention and a gated MLP read it. A tied head cannot take the norm's gain."""
    model = Llama().double().eval()
    for module in model.modules():
        nn.init.uniform_(module.weight, 0.5, 2.0) if isinstance(module, nn.RMSNorm) else None
    found = fxmerge.analyze(model, torch.randint(0, WORDS, (3, LENGTH)), scope="all")
    assert rotation_errors(found)["words"] < 1e-12
    model.head.weight = model.words.weight
    tied = fxmerge.analyze(model, torch.randint(0, WORDS, (3, LENGTH)), scope="all")
    assert all(g.nonlinear for g in tied.groups if g.channels == WIDTH and g.name in ("words", "head"))


def test_a_plan_is_replayed() -> None:
    model, x = stream("layer"), inputs(16)
    result = fxmerge.merge(model, x, decomposition="pca", **only(12), calibration=[inputs(32)])
    again = fxmerge.apply(fxmerge.Plan.from_json(result.plan.json()), model, x, calibration=[inputs(32)])
    assert torch.equal(result.module(x), again.module(x)) and again.plan == result.plan


def test_budgets_measure_what_the_stream_loses_alone() -> None:
    """A stream of 7 dimensions narrows; layers that lose nothing to it stay."""
    model = stream("layer", rank=RANK)
    result = fxmerge.merge(model, inputs(8), budget={"params": 0.6}, calibration=[inputs(128)], scope="all")
    (plan,) = (g for g in result.plan.groups if g.name == NAME)
    assert plan.components is not None and len(plan.kept) < WIDTH
    assert off(result.module, model, inputs(32, 2)) < 0.05


class Bottlenecks(nn.Module):
    """Two linear bottlenecks as in MobileNetV2, of which the second one is added to the first one."""

    def __init__(self, rank: int = WIDTH, scaled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.project = nn.ModuleList(nn.Conv2d(n, WIDTH, 1, bias=b) for n, b in ((16, True), (32, False)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(2))
        self.expand = nn.ModuleList(nn.Conv2d(WIDTH, 32, k, padding=k // 2, bias=False) for k in (1, 3))
        self.after = nn.BatchNorm2d(32)
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1) + 0.5) if scaled else 1.0
        self.head = nn.Linear(32, CLASSES)
        basis = torch.linalg.qr(torch.randn(WIDTH, rank))[0]
        with torch.no_grad():
            for conv, own, last in zip(self.project, self.norms, (1.0, self.scale), strict=True):
                own.running_var.uniform_(0.5, 2)
                own.weight.uniform_(0.5, 2)
                last = torch.as_tensor(last).reshape(-1, 1)
                gain = (own.weight / (own.running_var + own.eps).sqrt())[:, None] * last
                conv.weight.copy_((basis @ torch.randn(rank, conv.in_channels) / gain)[..., None, None])
                own.bias.copy_((basis @ torch.randn(rank, 1) / last)[:, 0])
                own.running_mean.copy_(torch.zeros(WIDTH) if conv.bias is None else conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.norms[0](self.project[0](x))
        x = x + self.norms[1](self.project[1](torch.relu(self.after(self.expand[0](x))))) * self.scale
        return self.head(torch.relu(self.expand[1](x)).mean((2, 3)))  # type: ignore[no-any-return]


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


BOTTLENECK: dict[str, Any] = {"keep": {"project.0": RANK, "stem": 1.0, "expand.*": 1.0}, "scope": "all"}


@pytest.mark.parametrize("scaled", [False, True])
def test_linear_bottlenecks_may_be_rotated(scaled: bool) -> None:
    """Their BatchNorms become those of the rotated channels."""
    model = Bottlenecks(scaled=scaled).double().eval()
    assert rotation_errors(fxmerge.analyze(model, images(4), scope="all"))["project.0"] < 1e-12
    narrow = Bottlenecks(rank=RANK, scaled=scaled).double().eval()
    for more in ({"refit": "none"}, {"calibration": [images(64)]}):
        for decomposition in ("pca", "auto"):
            result = fxmerge.merge(narrow, images(8), decomposition=decomposition, **BOTTLENECK, **more)
            (plan,) = (g for g in result.plan.groups if g.name == "project.0")
            assert len(plan.kept) == RANK and plan.components == pytest.approx(1)
            assert off(result.module, narrow, images(16, 2)) < 1e-6
    assert isinstance(result.model, Bottlenecks) and result.model.norms[0].num_features == RANK
    assert off(result.model, narrow, images(16, 2)) < 1e-6


def test_running_statistics_are_those_of_rotated_channels() -> None:
    """Exactly so for white inputs: a copy in training mode computes nearly the same."""
    model = Bottlenecks().double().eval()
    model.stem = nn.Identity()
    model.project[0] = nn.Conv2d(3, WIDTH, 1).double()
    weight = model.project[0].weight.detach().flatten(1)
    model.norms[0].running_var.copy_(weight.square().sum(1))
    model.norms[0].running_mean.copy_(model.project[0].bias.detach())
    found = fxmerge.analyze(model, images(4), scope="all")
    (group,) = (g for g in found.groups if g.name == "project.0")
    turned = rotated(found.captured, [(group, drawn(group))]).module
    outputs = turned.get_submodule("project.0")(torch.randn(4096, 3, 2, 2).double())
    norm = turned.get_submodule("norms.0")
    torch.testing.assert_close(norm.running_var, outputs.var((0, 2, 3)), rtol=0.05, atol=1e-3)
    torch.testing.assert_close(norm.running_mean, outputs.mean((0, 2, 3)), rtol=0, atol=0.05)
    torch.testing.assert_close(norm.weight, (norm.running_var + norm.eps).sqrt())


@pytest.mark.parametrize("decomposition", ["pca", "prune"])
def test_rotated_norms_are_not_held(decomposition: str) -> None:
    """The statistics of rotated channels are estimates, so that probes are not scaled to them."""
    options = Options(decomposition=decomposition, refit="synthetic", samples=64, **BOTTLENECK)
    ready = prepared(Bottlenecks().double().eval(), images(8), options, None, silent)
    streams = ready.streams(ready.draft(ready.choose(options)))
    run = PairedRun(streams, ready.data.batches, replace(ready.settings, held=True))
    assert set(run.norms) == {"after"} | (set() if decomposition == "pca" else {"norms_0", "norms_1"})


def after(m: Any, x: Tensor) -> Tensor:
    return m.n(m.a(x) + m.c(x))  # type: ignore[no-any-return]


def parts(**more: Any) -> dict[str, Any]:
    return {"a": nn.Linear(10, 14), "c": nn.Linear(10, 14), "b": nn.Linear(14, 9), "n": nn.LayerNorm(14), **more}


HINDERED = {
    "a norm in the stream": (lambda m, x: m.b(m.o(after(m, x) + m.c(x))), {"o": nn.LayerNorm(14)}, "joins channels"),
    "a scale in the stream": (
        lambda m, x: m.b(m.n((m.a(x) + m.c(x)) * m.s + m.c(2 * x))), {"s": nn.Parameter(torch.rand(14))}, "joins"
    ),
    "a layer that reads before the scale": (
        lambda m, x: m.b(m.n((y := m.a(x)) * m.s + m.c(x))) + m.b(y), {"s": nn.Parameter(torch.rand(14))}, "joins"
    ),
    "a constant after the norm": (lambda m, x: m.b(after(m, x) + m.s), {"s": nn.Parameter(torch.rand(14))}, "between"),
    "a norm with a bias alone": (
        lambda m, x: m.b(F.layer_norm(m.a(x), (14,), None, m.s)), {"s": nn.Parameter(torch.rand(14))}, "of their own"
    ),
    "one head after two norms": (
        lambda m, x: m.b(after(m, x)) + m.b(m.o(m.a(x) + m.c(x))), {"o": nn.LayerNorm(14)}, "different parameters"
    ),
    "a variance": (
        lambda m, x: m.b((y := m.a(x)) * torch.rsqrt(y.var(-1, keepdim=True) + 1e-5)), {}, "var mixes its channels"
    ),
    "squares that are read, too": (
        lambda m, x: m.b((y := m.a(x)) * torch.rsqrt((z := y.pow(2)).mean(-1, keepdim=True))) + m.b(z), {}, "mean mixes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HINDERED)
def test_what_hinders_a_rotation_is_told(case: str) -> None:
    wiring, more, reason = HINDERED[case]
    torch.manual_seed(0)
    own = {n: nn.Parameter(p.double()) if isinstance(p, nn.Parameter) else p for n, p in parts(**more).items()}
    model = Net(wiring, **own).double().eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
    x = inputs(3)
    found = fxmerge.analyze(model, x, scope="all")
    groups = [g for g in found.groups if any(p.layer.module == "a" for p in g.producers)]
    assert groups and all(reason in g.nonlinear for g in groups), [g.nonlinear for g in groups]
    result = plain_merge(model, x, ratio=0.3, decomposition="pca", scope="all")
    assert all(g.components is None for g in result.plan.groups)
    assert reason in result.report.text(width=400)


WRITTEN = {
    "powers": lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5),
    "products": lambda y: y * torch.rsqrt((y * y).mean(2, True) + 1e-5),
    "a norm without parameters": lambda y: F.layer_norm(y, (14,)),
    "a quotient": lambda y: y / torch.sqrt(torch.mean(y**2, dim=-1, keepdim=True) + 1e-5),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_however_a_norm_is_written_out(form: str) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(WRITTEN[form](m.a(x) + m.c(x)) * m.s), s=nn.Parameter(torch.rand(14)), **parts())
    found = fxmerge.analyze(model.double().eval(), inputs(3), scope="all")
    assert rotation_errors(found)["a"] < 1e-12


def test_a_gain_of_zero_beside_a_bias_hinders() -> None:
    """The norm could not keep the constant that the layer reads there. Without the bias, nothing is read there."""
    model = stream("layer")
    with torch.no_grad():
        model.norms[1].weight[3] = 0.0
        model.norms[1].bias[3] = 0.0
    assert rotation_errors(fxmerge.analyze(model, inputs(4), scope="all"))[NAME] < 1e-12
    with torch.no_grad():
        model.norms[1].bias[3] = 1.0
    found = fxmerge.analyze(model, inputs(4), scope="all")
    assert next(g for g in found.groups if g.name == NAME).nonlinear.endswith("has gains near zero")


def test_one_norm_for_several_layers_moves_into_each() -> None:
    """Called twice, with the weights that both calls share; and a norm without parameters."""
    for last in (nn.Identity(), nn.LayerNorm(14, elementwise_affine=False)):
        torch.manual_seed(0)
        model = Net(
            lambda m, x: m.b(m.n(m.a(x) + m.c(x))) + m.d(m.l(m.n(m.a(x) + m.c(x))[:, :1])),
            **parts(d=nn.Linear(14, 9), l=last),
        ).double().eval()  # fmt: skip
        nn.init.uniform_(model.n.weight, 0.5, 2.0)
        found = fxmerge.analyze(model, inputs(3), scope="all")
        if isinstance(last, nn.Identity):
            assert rotation_errors(found)["a"] < 1e-12
        else:
            assert "between" in found.groups[0].nonlinear


def test_half_precision() -> None:
    model = Stream("layer").bfloat16().eval()
    x = inputs(64).bfloat16()
    result = fxmerge.merge(model, x[:8], decomposition="pca", **only(18), calibration=[x])
    assert next(g for g in result.plan.groups if g.name == NAME).components is not None
    assert off(result.module.double(), model.double(), inputs(32, 2)) < 0.2
