"""Regions: which layers are fitted together, and that the model continues with what was fitted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.calibration.epilogue import affine
from fxmerge.ir.layer_ops import LayerOp
from fxmerge.ir.provenance import Layer
from fxmerge.refit import joint, regions
from fxmerge.refit.joint_steps import JointSteps
from fxmerge.refit.regions import Region
from fxmerge.refit.targets import Target
from tests.helpers.netmaking import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Fire(nn.Module):
    """A squeeze, two expands whose outputs are concatenated, and a layer that reads both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.s, self.e1, self.e3 = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 10, 1), nn.Conv2d(8, 10, 3, padding=1)
        self.o, self.act = nn.Conv2d(20, 6, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.s(x))
        out: Tensor = self.o(torch.cat([self.act(self.e1(x)), self.act(self.e3(x))], 1))
        return out


class Fork(nn.Module):
    """Two layers that read one stream, of which the first is reached long before the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.a, self.b = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.w(x))
        a = self.a(x)
        out: Tensor = a + self.b(F.pad(x, (1, 1, 1, 1)))
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.g, self.u, self.d = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.d(F.silu(self.g(x)) * self.u(x))
        return out


class Excited(nn.Module):
    """A squeeze-and-excitation block: its two layers are in the middle of a region."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.f, self.g, self.b = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        out: Tensor = self.b(x * torch.sigmoid(self.g(torch.relu(self.f(x.mean((2, 3), keepdim=True))))))
        return out


class Chain(nn.Module):
    """A depthwise layer belongs to the region around it; what two layers read ends none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.Conv2d(4, 4, 1)
        self.c, self.e = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.d(self.a(x).relu()))
        z: Tensor = self.e(self.c(y) * y)
        return z


class Residual(nn.Module):
    """A stream that more layers write and read than are fitted together."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a, self.b = (nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(torch.relu(a(x)))
        out: Tensor = self.last(x)
        return out


class Order(nn.Module):
    """Between the two layers that read a's channels, a layer that reads the first of them has been solved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        out: Tensor = self.c(self.b(y)) + self.d(y)
        return out


class Read(nn.Module):
    """The model returns what the second layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return y, self.b(y)


def layers_of(graph: fx.GraphModule) -> dict[str, Layer]:
    """The layers as the analysis would name them, made here."""
    found = {}
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
            op = "linear" if isinstance(module, nn.Linear) else "depthwise" if depthwise else "conv"
            found[node.name] = Layer(node.name, node.name, LayerOp(op), {"weight": f"{node.target}.weight"})
    return found


def regions_of(model: nn.Module, lost: Any = lambda layer: True, shared: Any = ()) -> list[Region]:
    graph = fx.symbolic_trace(model)
    return regions.regions(layers_of(graph), list(graph.graph.nodes), lost, shared)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Chain(), [(["a", "d", "b"], ["b"]), (["b", "c", "e"], ["e"])]),
        (Fire(), [(["s", "e1", "e3"], ["e1", "e3"]), (["e1", "e3", "o"], ["o"])]),
        (Attention(), [(["q", "k", "v", "o"], ["o"])]),
        (Gated(), [(["g", "u", "d"], ["d"])]),
        (Excited(), [(["f", "g"], ["g"]), (["a", "f", "g", "b"], ["b"])]),
        (Residual(1), [(["a_0", "b_0"], ["b_0"]), (["first", "a_0", "b_0", "last"], ["last"])]),
        (Residual(4), [(["a_0", "b_0"], ["b_0"]), (["a_1", "b_1"], ["b_1"]), (["a_2", "b_2"], ["b_2"]),
                       (["a_3", "b_3"], ["b_3"])]),
        (Order(), [(["b", "c"], ["c"])]),
        (Read(), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_layers_that_are_fitted_together(model: nn.Module, expected: Any) -> None:
    found = regions_of(model)
    assert [([layer.node for layer in r.layers], list(r.ends)) for r in found] == expected


def test_nothing_outside_reads_what_is_computed_inside() -> None:
    for model in (Chain(), Fire(), Attention(), Gated(), Excited(), Residual(1)):
        for region in regions_of(model):
            own = set(region.nodes)
            for node in own:
                assert node.name in region.ends or set(node.users) <= own
            assert region.replay == tuple(n for n in region.replay if n.name != region.ends[-1])
            assert {n for n in own if n.name != region.ends[-1]} <= set(region.replay)


def test_shared_weights_and_layers_that_lost_nothing_have_no_region() -> None:
    assert [r.ends for r in regions_of(Chain(), shared={"d.weight"})] == [("e",)]
    assert [r.ends for r in regions_of(Chain(), lost=lambda layer: layer.node != "b")] == [("e",)]
    assert not regions_of(Attention(), shared={"q.weight"})


NETS = [
    (Fire, (64, 6, 8, 8)),
    (Attention, (64, 10, 12)),
    (Gated, (64, 10, 12)),
    (Excited, (64, 6, 8, 8)),
    (Fork, (64, 6, 8, 8)),
]


def merged(model: nn.Module, x: Tensor, **changes: Any) -> fxmerge.Result:
    given = {"ratio": 0.3, "scope": "all", "selection": "l2", "calibration": list(x.split(16))}
    return fxmerge.merge(model, x[:2], **given | changes)


@pytest.mark.parametrize(("kind", "shape"), NETS, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_fitted_together_they_come_nearer(kind: Any, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On inputs that were never seen, in comparison with the same merge without joint steps."""
    model = kind().eval()
    x, fresh = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def off() -> float:
        result = merged(model, x)
        with torch.no_grad():
            return float((result.module(fresh) - model(fresh)).square().sum())

    together = off()
    monkeypatch.setattr(joint, "BUDGET", 0.0)
    assert together < 0.9 * off()


@pytest.mark.parametrize(("kind", "shape"), NETS, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_the_run_continues_with_what_was_fitted(kind: Any, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each joint step, the values of the run are those of a new run of the merged graph."""
    checked: list[str] = []
    fit = JointSteps._fit

    def watched(steps: JointSteps, region: Region, ends: Any) -> bool:
        better, run = fit(steps, region, ends), steps.paired.merged
        for number, batch in enumerate(run.batches):
            values: dict[str, Any] = {}

            class Watching(fx.Interpreter):
                def run_node(self, n: fx.Node) -> Any:
                    found = super().run_node(n)
                    values[n.name] = found  # noqa: B023
                    return found

            Watching(run.module).run(*batch, enable_io_processing=False)
            for name in run.values.keys() & {node.name for node in region.replay}:
                torch.testing.assert_close(run.values[name][number], values[name], rtol=1e-4, atol=1e-5)
                checked.append(name)
        return better

    monkeypatch.setattr(JointSteps, "_fit", watched)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    merged(kind().eval(), x)
    assert checked


def test_ends_count_alike_whatever_their_units() -> None:
    """An end with outputs a hundred times as large has an energy with a factor of 1e-4 of the other's."""
    outputs = torch.randn(2, 50, 3, dtype=torch.float64)

    def end(scale: float) -> joint.End:
        step = affine(torch.full((3,), scale, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
        targets = [Target(outputs=y, axis=1, affine=step, bounds=None) for y in outputs]
        nothing = [torch.zeros(50, dtype=torch.bool)] * 2
        return joint.End(targets=targets, held=nothing, used=[~none for none in nothing])

    small, large = (end(scale).variance(lambda t: t) for scale in (1.0, 100.0))
    assert small == pytest.approx(float(outputs.flatten(0, 1).var(0, correction=0).sum()))
    assert large == pytest.approx(1e4 * small)


def test_what_was_written_in_place_is_left_to_single_layers() -> None:
    """An op that writes to a value that a region has read makes the region out of date."""
    (region,) = regions_of(Gated())
    values = {"x": [torch.randn(3, 12)]}
    region.watch(region.nodes[0], values)
    assert region.intact(values)
    values["x"][0].add_(1)
    assert not region.intact(values)
    assert not region.intact({})
