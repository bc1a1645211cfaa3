"""fxmerge as a pass of torch.fx's PassManager, and ahead of torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

import fxmerge
from fxmerge import FxMergeError, MergePass, Options
from fxmerge.graph.compare import difference, outputs
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = Options(refit="none")


def traced(name: str) -> tuple[fx.GraphModule, Any]:
    model, x = NETS[name]()
    return fx.symbolic_trace(model), x


@pytest.mark.parametrize("name", ["residual", "dense", "encoder", "two_outputs"])
def test_the_pass_gives_what_merge_gives(name: str) -> None:
    module, x = traced(name)
    before = outputs(module, (x,))
    result = MergePass(PLAIN, x)(module)
    assert isinstance(result, PassResult)
    assert result.modified
    result.graph_module.graph.lint()
    assert difference(outputs(plain_merge(NETS[name]()[0], x).module, (x,)), outputs(result.graph_module, (x,))) == 0
    assert difference(before, outputs(module, (x,))) == 0  # the module that came in is left alone


class Renamed(PassBase):
    """Another pass, which makes a graph module of its own."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        made = fx.GraphModule(graph_module, graph_module.graph)
        made.meta = dict(graph_module.meta)
        return PassResult(made, False)


def test_in_a_pass_manager_it_merges_once() -> None:
    """However often the manager runs it: half of the channels go, not three quarters."""
    module, x = traced("residual")
    manager = PassManager([Renamed(), MergePass(PLAIN, x), Renamed()], steps=4, run_checks_after_each_pass=True)
    manager.add_checks(lambda m: m.graph.lint())
    first = manager(module)
    assert first.modified
    assert [m.out_channels for m in first.graph_module.children() if isinstance(m, nn.Conv2d)] == [
        m.out_channels for m in plain_merge(NETS["residual"]()[0], x).module.children() if isinstance(m, nn.Conv2d)
    ]
    again = manager(first.graph_module)
    assert not again.modified
    assert difference(outputs(first.graph_module, (x,)), outputs(again.graph_module, (x,))) == 0


def test_a_graph_with_nothing_to_merge_is_not_modified() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2)))
    result = MergePass(PLAIN, torch.randn(1, 3))(module)
    assert not result.modified
    assert result.graph_module is module


def true_shapes(module: fx.GraphModule, x: Tensor) -> dict[str, tuple[int, ...]]:
    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n.name] = tuple(value.shape)
            return value

    shapes: dict[str, tuple[int, ...]] = {}
    Noting(module).run(x)
    return shapes


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_inputs_and_shapes_from_tensor_meta(name: str) -> None:
    """No example inputs: the graph's own metadata serves, is renewed, and the rest of it is kept."""
    module, x = traced(name)
    ShapeProp(module).propagate(x)
    for node in module.graph.nodes:
        node.meta["mine"] = node.name
    running = {k: v.clone() for k, v in module.named_buffers()}
    merged = MergePass(PLAIN)(module).graph_module
    expected = true_shapes(merged, x)
    assert expected != true_shapes(module, x)
    held = {n.name: n.meta.get("tensor_meta") for n in merged.graph.nodes}
    told = {name: tuple(meta.shape) for name, meta in held.items() if hasattr(meta, "shape")}
    assert {k: v for k, v in told.items() if k != "output"} == {k: v for k, v in expected.items() if k != "output"}
    assert all(n.meta.get("mine") == n.name for n in merged.graph.nodes if n.name in told)
    assert all(torch.equal(running[k], v) for k, v in module.named_buffers())


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_inputs_and_shapes_from_val(name: str) -> None:
    """An exported graph: symbolic sizes stay symbolic."""
    model, x = NETS[name]()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
    merged = MergePass(PLAIN)(program.module()).graph_module
    values = {n.name: n.meta["val"] for n in merged.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    expected = true_shapes(merged, x)
    assert len(values) > 5
    for node, value in values.items():
        assert [v for v in value.shape if not isinstance(v, torch.SymInt)] == [
            e for v, e in zip(value.shape, expected[node], strict=True) if not isinstance(v, torch.SymInt)
        ]
    assert isinstance(values["x"].shape[0], torch.SymInt)
    assert isinstance(values[next(n for n in values if "linear" in n)].shape[0], torch.SymInt)
    assert merged(torch.cat([x, x, x])).shape[0] == 3 * len(x)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MergePass(0.5), r"options is a float; give fxmerge.Options"),  # type: ignore[arg-type]
    (lambda: MergePass()(nn.Linear(2, 2)), r"was given a Linear; give a torch.fx.GraphModule, or use fxmerge.merge"),  # type: ignore[arg-type]
    (lambda: MergePass()(traced("mlp")[0]), r"input x has no shape in its metadata; give MergePass"),
])  # fmt: skip
def test_wrong_use_of_the_pass(make: Any, message: str) -> None:
    with pytest.raises(FxMergeError, match=message):
        make()


@pytest.mark.parametrize("name", ["residual", "dense", "encoder"])
def test_compile_makes_one_graph(name: str) -> None:
    model, x = NETS[name]()
    graphs = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = fxmerge.compile(model, x, PLAIN, backend=backend)
    expected = plain_merge(model, x).module
    assert difference(outputs(expected, (x,)), outputs(compiled, (x,))) <= 1e-6
    assert len(graphs) == 1
    explained = torch._dynamo.explain(expected)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.slow
def test_compile_by_inductor() -> None:
    model, x = NETS["residual"]()
    compiled = fxmerge.compile(model, x, PLAIN)
    try:
        given = outputs(compiled, (x,))
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no C++ compiler: {error}")
    assert difference(outputs(plain_merge(model, x).module, (x,)), given) <= 1e-5


def test_compile_takes_the_options_of_a_merge() -> None:
    model, x = NETS["mlp"]()
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    compiled = fxmerge.compile(model, x, ratio=0.75, refit="none", backend=backend, dynamic=False)
    expected = fxmerge.merge(model, x, ratio=0.75, refit="none").module
    torch.testing.assert_close(compiled(x), expected(x))
    assert len(seen) == 1
    changed = fxmerge.compile(model, x, fxmerge.Options(refit="none"), ratio=0.75, backend=backend)
    torch.testing.assert_close(changed(x), expected(x))
    batches = [torch.randn_like(x) for _ in range(2)]
    calibrated = fxmerge.compile(model, x, calibration=batches, backend=backend)
    torch.testing.assert_close(calibrated(x), fxmerge.merge(model, x, calibration=batches).module(x))
    with pytest.raises(FxMergeError, match=r"ratio is 2; it is the share"):
        fxmerge.compile(model, x, ratio=2)
    with pytest.raises(
        FxMergeError, match=r"unknown argument 'refti'; the options .* refit,.* torch.compile are .*mode"
    ):
        fxmerge.compile(model, x, refti="none")
