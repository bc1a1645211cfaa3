"""`decomposition="pca"`, and what `auto` takes of it: exact at full rank, the truncated SVD of two layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import Options, Plan
from fxmerge.pipeline import prepared
from fxmerge.progress import silent
from tests.helpers.netmaking import Net, conv, one_thread, plain_merge  # noqa: F401
from tests.helpers.rotation import rotation_errors
from tests.helpers.values import HEAD, LAYOUTS, Attention, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = [layout for layout in LAYOUTS if layout != "packed"]


def chain(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x))  # type: ignore[no-any-return]


def linear_chain(bias: bool = True, **more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Net(chain, a=nn.Linear(10, 14, bias=bias), b=nn.Linear(14, 9, bias=bias), **more).double().eval()


def off(module: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((module(x) - model(x)).norm() / model(x).norm())


def values_of(model: Attention) -> str:
    return "qkv" if model.layout == "packed" else "v"


def value_group(found: fxmerge.Analysis, model: Attention) -> str:
    """The name of the group of the values."""
    (name,) = [g.name for g in found.groups if not g.nonlinear]
    assert name.startswith(values_of(model))
    return name


def narrowed(model: Attention, x: Tensor, keep: float, **options: Any) -> fxmerge.Result:
    """Only the values lose channels."""
    found = fxmerge.analyze(model, x)
    name = value_group(found, model)
    others = {g.name: 1.0 for g in found.groups if g.name != name}
    return fxmerge.merge(model, x, keep={**others, name: keep}, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ALONE)
def test_values_of_attention_may_be_rotated(layout: str, bias: bool) -> None:
    """Each head by a matrix of its own, also where all heads lose the same places; queries and keys may not."""
    model = Attention(layout, bias)
    found = fxmerge.analyze(model, tokens(4))
    name = value_group(found, model)
    (group,) = [g for g in found.groups if g.name == name]
    assert group.strands.count * len(group.cells.unique()) == (2 if layout in ("grouped", "expanded") else 4)
    assert rotation_errors(found)[name] < 1e-12


def test_values_in_one_block_with_queries_are_merged_as_by_auto() -> None:
    """A view as (3, heads, width) makes them one group with queries and keys, whose products are no linear path."""
    model, x = Attention("packed"), tokens(4)
    result = plain_merge(model, x, ratio=0.5, decomposition="pca")
    assert result.plan.groups[0].components is None
    assert "attention is not linear" in result.report.text(width=300)
    assert torch.equal(result.module(x), plain_merge(model, x, ratio=0.5).module(x))


HINDERED = {
    "a function": (lambda m, x: m.b(torch.relu(m.a(x))), {}, "relu is not linear"),
    "a module": (lambda m, x: m.b(m.n(m.a(x))), {"n": nn.GELU()}, "GELU is not linear"),
    "a softmax": (lambda m, x: m.b(torch.softmax(m.a(x), -1)), {}, "softmax mixes its channels"),
    "a norm of each channel": (
        lambda m, x: m.b(m.n(m.a(x))), {"n": nn.BatchNorm1d(14, track_running_stats=False)},
        "parameters of their own (batch_norm)"
    ),
    "a norm of parts": (lambda m, x: m.b(F.layer_norm(m.a(x).view(3, 6, 2, 7), (7,)).flatten(2)), {}, "or some twice"),
    "a scale": (lambda m, x: m.b(m.s / m.a(x)), {"s": nn.Parameter(torch.rand(14))}, "parameters of their own"),
    "ones around": (lambda m, x: m.b(F.pad(m.a(x), (0, 0, 1, 2), value=1.0)), {}, "pad is not linear"),
    "a gate": (lambda m, x: m.b(m.a(x) * torch.sigmoid(m.a(x))), {}, "multiplied by each other"),
    "a square": (lambda m, x: m.b(m.a(x) * m.a(x)), {}, "multiplied by each other"),
    "a constant": (lambda m, x: m.b(m.a(x) + 1.0), {}, "add is not linear"),
    "keys and values": (
        lambda m, x: m.b(F.scaled_dot_product_attention(m.q(x), m.a(x), m.a(x))), {"q": nn.Linear(10, 14)}, "linear"
    ),
    "a mask by itself": (lambda m, x: m.b(m.a(x) * (m.a(x) > 0)), {}, "multiplied by each other"),
    "a norm beside": (lambda m, x: m.b(m.a(x)) * m.a(x).norm(dim=-1, keepdim=True), {}, "norm mixes its channels"),
    "a grouped layer": (
        lambda m, x: m.c(m.a(x)[..., None]), {"c": nn.Conv1d(14, 8, 1, groups=2)}, "not mixed (conv in groups)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HINDERED)
def test_what_hinders_a_rotation_is_told(case: str) -> None:
    wiring, parts, reason = HINDERED[case]
    torch.manual_seed(0)
    parts = {n: nn.Parameter(p.double()) if isinstance(p, nn.Parameter) else p for n, p in parts.items()}
    model = Net(wiring, a=nn.Linear(10, 14), b=nn.Linear(14, 9), **parts).double().eval()
    x = torch.randn(3, 6, 10, dtype=torch.float64)
    x = x[:, 0] if case in ("a grouped layer", "a norm of each channel") else x
    found = fxmerge.analyze(model, x)
    groups = [g for g in found.groups if any(p.layer.module == "a" for p in g.producers)]
    assert groups and all(reason in g.nonlinear for g in groups), [g.nonlinear for g in groups]
    result = plain_merge(model, x, ratio=0.5, decomposition="pca")
    auto = plain_merge(model, x, ratio=0.5)
    assert torch.equal(result.module(x), auto.module(x))
    assert all(g.components is None for g in result.plan.groups)
    assert "merged as by auto, because a rotation does not pass" in result.report.text(width=400)
    assert reason in result.report.text(width=400)


PASSED = {
    "two layers": (chain, {}),
    "dropout and casts": (lambda m, x: m.b(m.d(m.a(x)).to(torch.float64).contiguous()), {"d": nn.Dropout(0.3)}),
    "a number": (lambda m, x: m.b(0.3 * m.a(x) / 2.0), {}),
    "a mean over positions": (lambda m, x: m.b(m.a(x).mean(1)), {}),
    "a sum of two": (lambda m, x: m.b(m.a(x) + m.c(x)), {"c": nn.Linear(10, 14)}),
    "a weighted sum of positions": (lambda m, x: m.b(torch.softmax(m.w(x), 1).mT @ m.a(x)), {"w": nn.Linear(10, 1)}),
    "a gate for all channels": (lambda m, x: m.b(m.a(x) * torch.sigmoid(m.w(x))), {"w": nn.Linear(10, 1)}),
    "zeros around": (lambda m, x: m.b(F.pad(m.a(x), (0, 0, 1, 2))), {}),
    "two readers": (lambda m, x: m.b(m.a(x)) + m.c(m.a(x)[:, :1]), {"c": nn.Linear(14, 9)}),
    "one layer twice": (lambda m, x: m.b(m.a(x)) + m.b(m.a(2 * x)), {}),
    "one layer again and again": (lambda m, x: m.b(m.c(m.c(m.a(x)))), {"c": nn.Linear(14, 14)}),
}


@pytest.mark.parametrize("case", PASSED)
def test_linear_paths_are_exact_at_their_rank(case: str) -> None:
    """Rows of rank 5 and no more: 5 components are the original, with no data and with data."""
    wiring, parts = PASSED[case]
    torch.manual_seed(0)
    model = Net(wiring, a=nn.Linear(10, 14, bias=False), b=nn.Linear(14, 9), **parts).double().eval()
    with torch.no_grad():
        basis = torch.randn(14, 5).double()
        for name in ("a", "c"):
            part = getattr(model, name, None)
            if isinstance(part, nn.Linear) and part.out_features == 14:
                own = basis.T @ basis if part.in_features == 14 else torch.randn(5, 10).double()
                part.weight.copy_(basis @ (own @ basis.T if part.in_features == 14 else own) / 14)
                part.bias = None
    x, unseen = torch.randn(32, 6, 10).double(), torch.randn(16, 6, 10).double()
    found = fxmerge.analyze(model, x)
    assert [g.name for g in found.groups if not g.nonlinear] == ["a"]
    assert rotation_errors(found)["a"] < 1e-12
    for more in ({"refit": "none"}, {"calibration": [x]}):
        for decomposition in ("pca", "auto"):
            result = fxmerge.merge(model, x, decomposition=decomposition, keep={"a": 5}, **more)
            assert len(result.plan.groups[0].kept) == 5 and result.plan.groups[0].components is not None
            assert off(result.module, model, unseen) < 1e-8
    names = {n for n, _ in model.named_parameters()}
    assert {n for n, _ in result.module.named_parameters()} == names  # no bias was added


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ALONE)
def test_values_of_low_rank_lose_nothing(layout: str, bias: bool) -> None:
    """Each head's rows have rank 3; with a bias, which attention passes on unchanged, 4 are enough without data."""
    model = Attention(layout, bias)
    with torch.no_grad():
        weight = model.qkv.weight[-4 * HEAD :] if layout == "packed" else model.v.weight
        rows = weight.view(HEAD, -1, 24).transpose(0, 1) if layout == "innermost" else weight.view(-1, HEAD, 24)
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        rows.copy_(u[..., :3] * s[..., None, :3] @ v[..., :3, :])
    x, unseen = tokens(32), tokens(16, seed=2)
    for more in ({"refit": "none"}, {"calibration": [x]}):
        result = narrowed(model, x, (3 + bias) / HEAD, decomposition="pca", **more)
        assert off(result.module, model, unseen) < 1e-8
    result = narrowed(model, x, 0.5, calibration=[x], decomposition="auto")
    assert off(result.module, model, unseen) < 1e-8  # the data show that the bias is a constant


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [3, 6])
def test_two_layers_without_data_are_their_truncated_svd(k: int, bias: bool) -> None:
    model, x = linear_chain(bias), torch.randn(8, 10).double()
    result = plain_merge(model, x, decomposition="pca", keep={"a": k})
    u, s, v = torch.linalg.svd(model.b.weight @ model.a.weight)
    product = u[:, :k] * s[:k] @ v[:k]
    torch.testing.assert_close(result.module.b.weight @ result.module.a.weight, product, rtol=0, atol=1e-9)
    zeros = torch.zeros(1, 10).double()
    torch.testing.assert_close(result.module(zeros), model(zeros), rtol=0, atol=1e-9)


def test_two_layers_with_data_are_the_best_of_their_rank() -> None:
    """The truncated SVD of W_b W_a C^1/2, with the covariance C of the inputs."""
    model, k = linear_chain(), 4
    x = torch.randn(4096, 10).double() @ torch.diag(torch.linspace(0.1, 3, 10)).double() @ torch.randn(10, 10).double()
    x = x + torch.randn(10).double()
    centred = x - x.mean(0)
    root = torch.linalg.cholesky(centred.T @ centred / len(x))
    s = torch.linalg.svdvals((model.b.weight @ model.a.weight @ root).detach())
    least = float(s[k:].square().sum() / s.square().sum())
    for decomposition in ("pca", "auto"):
        result = fxmerge.merge(
            model, x[:64], decomposition=decomposition, keep={"a": k}, calibration=list(x.split(512))
        )
        with torch.no_grad():
            missed = (result.module(x) - model(x)).square().sum()
            found = float(missed / (model(x) - model(x).mean(0)).square().sum())
        assert least * (1 - 1e-9) < found < 1.01 * least
    result = fxmerge.merge(model, x[:64], decomposition="lstsq", keep={"a": k}, calibration=list(x.split(512)))
    assert float((result.module(x) - model(x)).square().sum() / (model(x) - model(x).mean(0)).square().sum()) > found


@pytest.mark.parametrize("layout", ALONE)
def test_components_lose_less_than_channels(layout: str) -> None:
    """Before refit, on the tokens that both were chosen by."""
    model, x = Attention(layout, True), tokens(64)
    group = value_group(fxmerge.analyze(model, x), model)
    errors = {}
    for name in ("pca", "auto", "lstsq"):
        options = Options(decomposition=name, keep={group: 0.5}, ignore=("q", "k"), refit="calibration")
        ready = prepared(model, x, options, [x], silent)
        errors[name] = off(ready.draft(ready.choose(options)).graph, model, x)
    assert errors["pca"] == errors["auto"] < 0.95 * errors["lstsq"], errors


def test_refit_follows_the_components() -> None:
    """Two blocks: the second one's values are solved towards its components, as what they read has changed."""
    first, second = Attention("heads", seed=1), Attention("heads", seed=2)
    first.head = second.head = nn.Linear(24, 24).double()
    model = nn.Sequential(first, second, nn.Linear(24, 5).double()).eval()
    x, unseen = tokens(128), tokens(32, seed=3)
    found = fxmerge.analyze(model, x)
    keep = {g.name: 0.5 if not g.nonlinear else 1.0 for g in found.groups}
    assert sum(k < 1 for k in keep.values()) >= 2
    drafts, refitted = (
        fxmerge.merge(model, x, keep=keep, decomposition="pca", **more)
        for more in ({"refit": "none"}, {"calibration": [x]})
    )
    assert off(refitted.module, model, unseen) < 0.8 * off(drafts.module, model, unseen)
    handed = refitted.report.handed_out
    assert handed is not None and handed.name == "refitted"
    assert all(r.after <= r.before for r in refitted.report.refitted)


def test_duplicates_are_kept_as_channels_by_auto() -> None:
    """What loses nothing is left to partners: the plan tells which channel carries which."""
    model, x = linear_chain(), torch.randn(8, 10).double()
    with torch.no_grad():
        model.a.weight[7:] = 2 * model.a.weight[:7]
        model.a.bias[7:] = 2 * model.a.bias[:7]
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups[0].components is None and all(p.into >= 0 for p in result.plan.groups[0].partners)
    assert off(result.module, model, x) < 1e-9


@pytest.mark.parametrize("options", [
    {"selection": "l2"}, {"selection": "random"}, {"decomposition": "lstsq"}, {"decomposition": "prune"}
])  # fmt: skip
def test_other_options_keep_channels(options: dict[str, Any]) -> None:
    model, x = linear_chain(), torch.randn(8, 10).double()
    assert plain_merge(model, x, **options).plan.groups[0].components is None
    if "decomposition" not in options:
        assert plain_merge(model, x, decomposition="pca", **options).plan.groups[0].components is not None


@pytest.mark.parametrize("decomposition", ["pca", "auto"])
@pytest.mark.parametrize("more", [{"refit": "none"}, {"refit": "calibration"}, {"refit": "synthetic", "samples": 32}])
def test_a_plan_is_replayed(decomposition: str, more: dict[str, Any]) -> None:
    model, x = Attention("grouped"), tokens(16)
    given = {"calibration": [tokens(32)]} if more["refit"] == "calibration" else {}
    before = copy.deepcopy(model.state_dict())
    result = narrowed(model, x, 0.5, decomposition=decomposition, **more, **given)
    text = result.plan.json()
    assert '"components"' in text and Plan.from_json(text) == result.plan
    again = fxmerge.apply(Plan.from_json(text), model, x, **given)
    assert torch.equal(result.module(x), again.module(x))
    assert again.plan == result.plan
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    other = Attention("grouped", seed=5)  # rotated by its own weights
    replayed = fxmerge.apply(result.plan, other, x, **given)
    assert [(g.name, g.kept) for g in replayed.plan.groups] == [(g.name, g.kept) for g in result.plan.groups]
    assert off(replayed.module, other, x) < 0.3


def test_a_plan_without_components_is_read() -> None:
    """Plans of earlier versions have no such field."""
    data = json.loads(plain_merge(linear_chain(), torch.randn(8, 10).double(), decomposition="lstsq").plan.json())
    for group in data["groups"]:
        del group["components"]
    assert Plan.from_json(json.dumps(data)).groups[0].components is None


def test_the_report_tells_of_components(tmp_path: Path) -> None:
    model, x = linear_chain(), torch.randn(64, 10).double()
    result = plain_merge(model, x, decomposition="pca", ratio=0.5)
    plan = result.plan.groups[0]
    text = result.report.text()
    assert "principal components" in text and f"{plan.similarity:.2f}" in text and "by auto" not in text
    with torch.no_grad():
        missed, whole = result.module(x) - model(x), model(x) - model.b.bias
    share = 1 - float(missed.square().sum() / whole.square().sum())  # the inputs are white, as without data
    assert plan.components is not None and abs(plan.components - share) < 0.1
    data = json.loads(result.report.json())
    schema = Path(fxmerge.__file__).parent / "assets" / "report.schema.json"
    pytest.importorskip("jsonschema").Draft202012Validator(json.loads(schema.read_text())).validate(data)
    assert data["groups"][0]["components"] == plan.components and data["groups"][0]["partners"] == []
    result.report.html(tmp_path / "net.html")
    assert '"components":true' in (tmp_path / "net.html").read_text().replace(" ", "")


@pytest.mark.parametrize("decomposition", ["pca", "auto"])
def test_budgets_know_what_components_lose(decomposition: str) -> None:
    """Of two blocks whose values have ranks 2 and 6, the first one loses the channels."""
    first, second = Attention("heads", seed=1), Attention("heads", seed=2)
    first.head = second.head = nn.Linear(24, 24).double()
    with torch.no_grad():
        rows = first.v.weight.view(4, HEAD, 24)
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        rows.copy_(u[..., :2] * s[..., None, :2] @ v[..., :2, :])
    model = nn.Sequential(first, second, nn.Linear(24, 5).double()).eval()
    x = tokens(64)
    ignore = ("*.q", "*.k", "*.head")
    result = fxmerge.merge(
        model, x, budget={"params": 0.86}, calibration=[x], decomposition=decomposition, ignore=ignore
    )
    kept = {g.name: len(g.kept) for g in result.plan.groups}
    assert kept["0.v"] <= 8 < 20 <= kept.get("1.v", 24), kept
    spent = result.report.spent
    assert spent is not None and spent.left < 0.87


def test_images_and_half_precision() -> None:
    """1x1 and 3x3 convolutions with pooling between them; weights in bfloat16 are rotated in float64."""
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.fc(torch.relu(m.b(m.p(m.a(x)))).mean((2, 3))), a=conv(3, 16), p=nn.AvgPool2d(2), b=conv(16, 12),
        fc=nn.Linear(12, 4),
    ).eval()  # fmt: skip
    x = torch.randn(64, 3, 12, 12)
    found = fxmerge.analyze(model.double(), x.double())
    assert rotation_errors(found) == {"a": pytest.approx(0, abs=1e-12)}
    for dtype, tolerance in ((torch.float64, 0.5), (torch.float32, 0.5), (torch.bfloat16, 0.5)):
        own = copy.deepcopy(model).to(dtype)
        result = fxmerge.merge(
            own, x[:8].to(dtype), decomposition="pca", keep={"a": 8, "b": 1.0}, calibration=[x.to(dtype)]
        )
        assert result.plan.groups[0].components is not None
        plain = fxmerge.merge(
            own, x[:8].to(dtype), decomposition="prune", keep={"a": 8, "b": 1.0}, calibration=[x.to(dtype)],
            refit="calibration",
        )  # fmt: skip
        error, other = (off(r.module.double(), model.double(), x.double()) for r in (result, plain))
        assert error < tolerance * other + 0.02
