"""What merge returns is its own graph: the module that runs, the saved one and the exported one, refitted or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge import FxMergeError, pipeline, verify
from fxmerge.graph.compare import difference, outputs
from fxmerge.graph.outputs import returned
from fxmerge.ir.capture import Capture
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


def double_the_output(module: fx.GraphModule) -> None:
    """An edit of the graph that the code of the module does not follow."""
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        twice = module.graph.call_function(torch.mul, (output.args[0], 2))
    output.args = (twice,)


def test_an_edit_without_recompile_is_an_error() -> None:
    result = plain_merge(*NETS["mlp"]())
    captured, module = result.analysis.captured, result.module
    assert isinstance(module, fx.GraphModule)
    verify.compare(captured, module)
    double_the_output(module)
    with pytest.raises(FxMergeError, match="the code of the merged model is not that of its graph"):
        verify.compare(captured, module)
    module.recompile()
    assert verify.compare(captured, module).error > 0.5


def test_merge_checks_what_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    def assembled(captured: Capture, merged: fx.GraphModule) -> nn.Module:
        double_the_output(merged)
        return merged

    monkeypatch.setattr(pipeline, "assembled", assembled)
    with pytest.raises(FxMergeError, match="is not that of its graph"):
        plain_merge(*NETS["mlp"]())


class Branch(nn.Module):
    """Reads a value, so that its run is recorded and its parts are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.two = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        out: Tensor = self.two(y if x.sum() > 1e9 else -y)
        return out


def test_every_part_of_a_recorded_model_is_checked() -> None:
    torch.manual_seed(0)
    result = plain_merge(Branch().eval(), torch.randn(4, 6))
    assert result.analysis.captured.route == "recorded"
    verify.compare(result.analysis.captured, result.module)
    part = result.module.get_submodule("two")
    assert isinstance(part, fx.GraphModule)
    double_the_output(part)
    with pytest.raises(FxMergeError, match="the module 'two' of the merged model"):
        verify.compare(result.analysis.captured, result.module)


def refitted(name: str) -> tuple[fxmerge.Result, Any]:
    model, x = NETS[name]()
    return fxmerge.merge(model, x, ratio=0.5, samples=32), x


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_refitted_module_is_its_own_graph(name: str) -> None:
    result, x = refitted(name)
    module = result.module
    assert isinstance(module, fx.GraphModule)
    assert result.report.handed_out is not None  # there was a refit, whichever model is the closest
    with torch.no_grad():
        by_graph = returned(fx.Interpreter(module).run(x.clone()))
    assert difference(by_graph, outputs(module, (x,))) == 0
    assert {p for p, _ in module.named_parameters()} == parameters_in(module)


def parameters_in(module: fx.GraphModule) -> set[str]:
    """The parameters that the graph of a module reads; the others would be saved and refitted for nothing."""
    fetched = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    named = {name for name, _ in module.named_parameters()}
    return {name for name in named if name in fetched or name.rpartition(".")[0] in called}


@pytest.mark.parametrize("name", ["mlp", "functional", "grouped", "encoder", "words", "raw_parameters"])
def test_a_refitted_model_saved_and_exported_is_the_same(name: str, tmp_path: Path) -> None:
    result, x = refitted(name)
    other = torch.flip(x, (0, 1))
    expected = outputs(result.module, (other,))
    result.save(tmp_path / "saved")
    assert difference(expected, outputs(fxmerge.load(tmp_path / "saved"), (other,))) < 1e-6
    assert difference(expected, outputs(result.exported().module(), (other,))) < 1e-6
