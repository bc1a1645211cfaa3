"""Statistics of channels behind calls that are shared, norms of all kinds, and layers with several members."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import Options, Plan
from fxmerge.graph.compare import difference
from fxmerge.plan import GroupPlan
from fxmerge.planning.sources import shares
from fxmerge.planning.statistics import state, statistics
from fxmerge.report.picture.group_panel import cosines
from tests.helpers.netmaking import plain_merge, randomised
from tests.helpers.nets import NETS

SCALE = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)


def replayed(model: nn.Module, inputs: Any, kept: dict[str, tuple[int, tuple[int, ...]]], **options: Any) -> Any:
    """The model merged by a plan that keeps these channels: {group: (channels, kept)}."""
    plans = tuple(GroupPlan(name, n, index) for name, (n, index) in kept.items())
    return fxmerge.apply(Plan(Options(**{"refit": "none", **options}), plans), model, inputs)


def off(model: nn.Module, result: Any, *inputs: Tensor) -> float:
    """The relative error on inputs that the merge has not seen."""
    with torch.no_grad():
        one, other = model(*inputs), result.module(*inputs)
    return difference(*([y] if isinstance(y, Tensor) else list(y) for y in (one, other)))


# Weights that serve several calls


class Branch(nn.Module):
    """Channels 4 to 7 are copies of channels 0 to 3, scaled if `scaled`."""

    def __init__(self, norm: bool, scaled: bool) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1, bias=not norm), nn.Conv2d(8, 4, 1)
        self.bn = nn.BatchNorm2d(8) if norm else nn.Identity()
        randomised(self, 5).double()
        by = SCALE if scaled else torch.ones_like(SCALE)
        with torch.no_grad():
            if isinstance(self.bn, nn.BatchNorm2d):
                held = [self.bn.weight, self.bn.bias]
                for t in (self.bn.running_mean, self.bn.running_var, self.c1.weight):
                    t[4:] = t[:4]  # type: ignore[index]
            else:
                held = [self.c1.weight, self.c1.bias]  # type: ignore[list-item]
            for t in held:
                t[4:] = t[:4] * by.view(-1, *[1] * (t.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c2(torch.relu(self.bn(self.c1(x))))
        return out


class Siamese(nn.Module):
    def __init__(self, branch: Branch, join: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.f, self.join = branch, join

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.join([self.f(a), self.f(b), self.f(c)])


JOINS: dict[str, Callable[[list[Tensor]], Any]] = {
    "distance": lambda y: (y[0] - y[1]).abs() + y[2],
    "levels of a pyramid": lambda y: (y[0], F.interpolate(y[1], scale_factor=2.0), y[2]),
    "concatenated": lambda y: torch.cat(y, 1),
}


@pytest.mark.parametrize("method", ["mostsim", "fold", "lstsq"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("join", JOINS)
def test_copies_in_a_branch_of_three_calls_are_merged_exactly(join: str, norm: bool, scaled: bool, method: str) -> None:
    if method == "fold" and scaled:
        pytest.skip("fold joins channels without scales")
    model = Siamese(Branch(norm, scaled), JOINS[join]).eval()
    generator = torch.Generator().manual_seed(1)
    x = tuple(torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    unseen = [torch.randn(3, 3, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    result = replayed(model, x, {"f.c1": (8, (0, 1, 2, 3))}, decomposition=method)
    assert off(model, result, *unseen) < (1e-3 if method == "lstsq" else 1e-9)
    assert off(model, replayed(model, x, {"f.c1": (8, (0, 1, 2, 3))}, decomposition="prune"), *unseen) > 0.1


@pytest.mark.parametrize("method", ["mostsim", "fold", "lstsq"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_branch_is_merged_as_if_it_were_called_once(norm: bool, method: str) -> None:
    """Without copies too: the same steps, partners and weights."""

    class Once(nn.Module):
        def __init__(self, branch: Branch) -> None:
            super().__init__()
            self.f = branch

        def forward(self, a: Tensor) -> Tensor:
            out: Tensor = self.f(a)
            return out

    branch = randomised(Branch(norm, False), 7).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    models = (Once(branch), Siamese(branch, JOINS["concatenated"]))  # type: ignore[arg-type]
    found = [
        replayed(model, inputs, {"f.c1": (8, (0, 2, 3, 6))}, decomposition=method)
        for model, inputs in zip(models, ((x,), (x, x + 1, x.flip(3))), strict=True)
    ]
    steps = [r.analysis.groups[0].producers[0].steps for r in found]
    assert steps[0] == steps[1] == ("f_bn", "relu")
    partners = [[(p.channel, p.into) for p in r.plan.groups[0].partners] for r in found]
    assert partners[0] == partners[1]
    for one, other in zip(found[0].module.parameters(), found[1].module.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Recurrent(nn.Module):
    """A norm of its own at each of two calls of one layer."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.i, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.n1 = nn.BatchNorm2d(8)
        self.n2 = nn.BatchNorm2d(8) if own else self.n1
        randomised(self, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        out: Tensor = torch.relu(self.o(self.n1(x)) + self.o(self.n2(x + 1)))
        return out


@pytest.mark.parametrize("own", [False, True])
def test_a_weight_behind_two_norms_is_not_merged_and_the_report_says_why(own: bool) -> None:
    model = Recurrent(own).eval()
    report = plain_merge(model, torch.randn(2, 3, 4, 4), ratio=0.5, decomposition="mostsim").report
    said = "one weight is applied after different per-channel steps" in " ".join(report.text(width=400).split())
    found = next(p for p in report.plan.groups if p.name == "i")
    assert said == own and all(p.into < 0 for p in found.partners) == own


@pytest.mark.parametrize("behind", [(2.0, 2.0), (2.0, 1.5)])
def test_a_weight_behind_two_norms_absorbs_what_serves_both(behind: tuple[float, float]) -> None:
    """Channels 4 to 7 are 0 to 3, times a number behind each norm: exactly merged if it is the same behind both."""
    model = Recurrent(True).double().eval()
    with torch.no_grad():
        for value in (model.i.weight, model.i.bias, *model.n1.state_dict().values(), *model.n2.state_dict().values()):
            if value is not None and value.dim():
                value[4:] = value[:4]
        for norm, factor in zip((model.n1, model.n2), behind, strict=True):
            norm.weight[4:] *= factor
            norm.bias[4:] *= factor
    x, unseen = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    found = {
        how: off(model, replayed(model, (x,), {"i": (8, (0, 1, 2, 3))}, decomposition=how), unseen)
        for how in ("auto", "prune")
    }
    assert found["prune"] > 0.1
    assert found["auto"] < (1e-9 if behind[0] == behind[1] else 0.5 * found["prune"])


def test_outputs_that_are_concatenated_are_not_added() -> None:
    """The constants of copies: in a sum they add up, in a concatenation each producer has its own."""

    class Joined(nn.Module):
        def __init__(self, add: bool) -> None:
            super().__init__()
            self.a, self.b, self.n, self.m = nn.Linear(4, 6), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)
            self.o, self.add = nn.Linear(6, 2), add

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.n(self.a(x)), self.m(self.b(x))
            out: Tensor = self.o(a + b if self.add else torch.cat([a, b]))
            return out

    for add in (True, False):
        model: Any = randomised(Joined(add), 1).double().eval()
        with torch.no_grad():
            for layer, norm in ((model.a, model.n), (model.b, model.m)):
                for t in (layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias):
                    t[3:] = t[:3]
                norm.bias[3:] += 0.7  # a constant that both producers' copies differ by
        x = torch.randn(5, 4, dtype=torch.float64)
        (group,) = fxmerge.analyze(model, x).groups
        assert [float(s.sum()) for s in shares(group)] == [6.0 if add else 3.0] * 2
        result = replayed(model, x, {group.name: (6, (0, 1, 2))})
        assert off(model, result, torch.randn(7, 4, dtype=torch.float64)) < 1e-10


# Norms that use the statistics of their input


class OwnBatch(nn.Module):
    """F.batch_norm on batch statistics, although it has running ones."""

    def __init__(self, n: int, running: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        if running:
            self.register_buffer("mean", torch.zeros(n))
            self.register_buffer("var", torch.ones(n))
        self.running = running

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (self.mean, self.var) if self.running else (None, None)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=0.0, eps=1e-14)  # type: ignore[arg-type]


class OwnInstance(OwnBatch):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=1e-14)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d without running statistics": lambda: nn.BatchNorm2d(8, eps=1e-14, track_running_stats=False),
    "BatchNorm2d without anything": lambda: nn.BatchNorm2d(8, 1e-14, affine=False, track_running_stats=False),
    "F.batch_norm in training": lambda: OwnBatch(8, False),
    "F.batch_norm in training, with running statistics": lambda: OwnBatch(8, True),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, eps=1e-14),
    "InstanceNorm2d affine": lambda: nn.InstanceNorm2d(8, eps=1e-14, affine=True),
    "F.instance_norm": lambda: OwnInstance(8, False),
}
AFTER: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("position", ["its own", "of the consumers"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_takes_every_scale_away(name: str, position: str, after: str) -> None:
    """Rows that are multiples of others, with other constants: behind the norm, only gamma and beta tell them apart."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.o = nn.Conv2d(3, 8, 3, padding=1), NORMS[name](), nn.Conv2d(8, 4, 1)
            self.m, self.p = NORMS[name](), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x, f = self.a(x), AFTER[after]
            out: Tensor = self.o(f(self.n(x)))
            return out + self.p(f(self.m(x))) if position != "its own" else out

    model: Any = randomised(Net(), 3).double().eval()
    gammas = [t for n in (model.n, model.m) for t in (getattr(n, "weight", None), getattr(n, "bias", None))]
    same = after == "gelu" or position != "its own"
    with torch.no_grad():
        model.a.weight[4:] = model.a.weight[:4] * SCALE.view(-1, 1, 1, 1)
        for t in gammas:
            if t is not None:
                t[4:] = t[:4] * (1 if same else SCALE.flip(0))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    result = replayed(model, x, {"a": (8, (0, 1, 2, 3))}, lam=1.0)
    if position == "its own" or after == "relu":
        assert [p.into for p in result.plan.groups[0].partners] == [0, 1, 2, 3]
        assert off(model, result, torch.randn(3, 3, 6, 6, dtype=torch.float64)) < 1e-6
    if position == "its own" and gammas[0] is not None:
        scales = torch.tensor([p.scale for p in result.plan.groups[0].partners], dtype=torch.float64)
        torch.testing.assert_close(scales, torch.ones(4).double() if same else SCALE.flip(0))


def test_an_instance_norm_with_running_statistics_keeps_scales() -> None:
    """In evaluation it is an affine map, as a BatchNorm is: the scale is that of rows, gains and running deviations."""
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    randomised(model, 1).double().eval()
    with torch.no_grad():
        for t in (model[0].weight, model[0].bias, *(getattr(model[1], k) for k in ("weight", "running_var"))):
            t[4:] = t[:4]
        model[1].running_mean[4:], model[1].weight[4:] = model[1].running_mean[:4], 0.5 * model[1].weight[:4]
        model[1].bias[4:] = 0.5 * model[1].bias[:4]
    result = replayed(model, torch.randn(2, 3, 8, 8).double(), {"0": (8, (0, 1, 2, 3))})
    assert [round(p.scale, 9) for p in result.plan.groups[0].partners] == [0.5] * 4
    assert off(model, result, torch.randn(2, 3, 7, 7).double()) < 1e-10


# A layer with several members of one group


def test_every_member_of_a_norm_counts() -> None:
    """Queries, keys and values behind one BatchNorm: rows and gains by hand; an exact negative is one."""
    model, x = NETS["one_norm_for_all"]()
    held: Any = model
    with torch.no_grad():  # value channels 6 and 7 of the first head: the norm turns one into the other's negative
        held.qkv.weight[7] = held.qkv.weight[6]
        held.n.weight[7] = -held.n.weight[6]
        held.n.running_var[7] = held.n.running_var[6]
    found = fxmerge.analyze(model, x)
    group = next(g for g in found.groups if g.name == "qkv")
    assert len([m for m in group.per_channel_params if m.layer.module == "n"]) == 2
    tensors = state(found.captured.module)
    inner = statistics(group, found.captured, tensors, Options(lam=1.0)).evidence.inner
    assert isinstance(inner, Tensor)
    gain = held.n.weight / (held.n.running_var + held.n.eps).sqrt()
    rows = (held.qkv.weight.flatten(1) * gain[:, None]).double().detach()
    for member in group.producers:
        for channel, where in zip(member.channels.tolist(), member.where, strict=True):
            others = [(c, w) for c, w in zip(member.channels.tolist(), member.where, strict=True)]
            if member.where.size(1) == 1:
                expected = torch.stack([(rows[where] * rows[w]).sum() for _, w in others])
                torch.testing.assert_close(inner[channel, [c for c, _ in others]], expected, rtol=1e-5, atol=1e-9)
            else:  # copies with their own gains: the square of the length is right up to the spread of the gains
                lengths = rows[where].square().sum() / inner[channel, channel]
                assert 0.2 < float(lengths) < 5
    at = torch.arange(group.channels)
    shown = cosines(group, found.captured, tensors, Options(), at)
    places = {int(w[0]): c for m in group.producers if m.where.size(1) == 1
              for c, w in zip(m.channels.tolist(), m.where, strict=True)}  # fmt: skip
    one, other = places[6], places[7]
    assert float(shown[one, other]) == pytest.approx(-1.0, abs=1e-6)
    result = plain_merge(model, x, ratio=0.4, threshold=0.0)
    partners = {p.channel: p.into for g in result.plan.groups if g.name == "qkv" for p in g.partners}
    assert partners.get(one) != other and partners.get(other) != one


# Complex weights


class Complex(nn.Module):
    """Two layers, the second in one of three spellings; channels 8 to 15 are multiples of channels 0 to 7."""

    def __init__(self, kind: str, factor: complex) -> None:
        super().__init__()
        self.kind = kind
        made: Any = nn.Conv1d if kind == "conv" else nn.Linear
        more: Any = {"kernel_size": 1} if kind == "conv" else {}
        self.a, self.b = (made(i, o, dtype=torch.cdouble, **more) for i, o in ((6, 16), (16, 3)))
        with torch.no_grad():
            self.a.weight[8:], self.a.bias[8:] = factor * self.a.weight[:8], factor * self.a.bias[:8]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return F.linear(x, self.b.weight, self.b.bias) if self.kind == "functional" else self.b(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["mostsim", "fold", "lstsq", "prune"])
@pytest.mark.parametrize("kind", ["linear", "conv", "functional"])
def test_complex_layers_are_merged_right_or_left_with_a_reason(kind: str, method: str) -> None:
    torch.manual_seed(0)
    factor = 1.0 if method == "fold" else 0.5
    model, shape = Complex(kind, factor).eval(), (5, 6, 4) if kind == "conv" else (5, 6)
    x = torch.randn(shape, dtype=torch.cdouble)
    result = replayed(model, x, {"a": (16, tuple(range(8)))}, decomposition=method)
    real = off(model, result, torch.randn(shape, dtype=torch.cdouble))
    text = " ".join(result.report.text(width=400).split())
    assert result.module.b.weight.imag.abs().max() > 0.05 and result.module.b.bias.imag.abs().max() > 0.05
    if method in ("mostsim", "fold"):
        assert real < 1e-12 and result.report.verdict.error < 1e-12
    else:
        assert real > 0.1 and result.report.verdict.error > 0.1
        assert ("lstsq has no statistics of complex channels" in text) == (method == "lstsq")


def test_a_turned_copy_is_no_copy() -> None:
    """A multiple of i has the same length and is orthogonal by the real part: no partner, and no error of 0."""
    torch.manual_seed(0)
    model, x = Complex("linear", 1j).eval(), torch.randn(50, 6, dtype=torch.cdouble)
    result = replayed(model, x, {"a": (16, tuple(range(8)))}, threshold=0.9)
    assert {p.into for p in result.plan.groups[0].partners} == {-1}
    assert result.report.verdict.error > 0.1


@pytest.mark.parametrize("selection", ["l1", "l2", "gm", "reprune", "reprune-kernel"])
def test_selections_take_complex_channels(selection: str) -> None:
    """A channel with imaginary parts alone is as loud as one with real parts."""
    torch.manual_seed(0)
    model: Any = Complex("linear", 0.01).eval()
    with torch.no_grad():
        model.a.weight[:8] = 1j * model.a.weight[:8].real
        model.a.bias[:8] = 1j * model.a.bias[:8].real
    result = plain_merge(model, torch.randn(5, 6, dtype=torch.cdouble), keep={"a": 8}, ratio=0.0, selection=selection)
    if selection in ("l1", "l2", "gm"):
        assert result.plan.groups[0].kept == tuple(range(8))
    assert len(result.plan.groups[0].kept) == 8


def test_refit_leaves_complex_layers_with_a_note() -> None:
    torch.manual_seed(0)
    model, x = Complex("linear", 0.5).eval(), torch.randn(40, 6, dtype=torch.cdouble)
    report = fxmerge.merge(model, x, ratio=0.5, calibration=[x], decomposition="prune").report
    assert [r.note for r in report.refitted] == ["unchanged: it is complex"]
    assert report.verdict.error > 0.1
