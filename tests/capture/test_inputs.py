"""Forms of example inputs and outputs, and fxmerge as a pass of torch.fx's pass infrastructure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

import fxmerge
from fxmerge import FxMergeError, MergePass, Options
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_merge_pass_in_a_pass_manager() -> None:
    model, x = NETS["residual"]()
    traced = fx.symbolic_trace(model)
    step = MergePass(Options(ratio=0.5, refit="none"), x)
    first = PassManager(passes=[step])(traced)
    assert first.modified
    assert counted(first.graph_module) < counted(traced)
    second = PassManager(passes=[step])(first.graph_module)
    assert not second.modified
    assert counted(second.graph_module) == counted(first.graph_module)
    assert PassManager(passes=[step], steps=3)(traced).modified


@pytest.mark.slow
def test_merge_pass_takes_shapes_from_metadata() -> None:
    model, x = NETS["mlp"]()
    traced = fx.symbolic_trace(model)
    with pytest.raises(FxMergeError, match="has no shape in its metadata"):
        MergePass()(traced)
    ShapeProp(traced).propagate(x)
    result = MergePass(Options(ratio=0.25))(traced)
    assert result.modified
    assert result.graph_module.a.out_features == 12
    assert not MergePass(Options(ratio=0.0), x)(traced).modified


class TwoInputs(nn.Module):
    """A model with two inputs, and a scale and a flag with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0, flag: bool = False) -> Tensor:
        out: Tensor = self.c(torch.relu(self.a(x) + self.b(y)) * scale)
        return -out if flag else out


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "dict in another order"])
def test_forms_of_example_inputs(form: str) -> None:
    torch.manual_seed(0)
    model, x, y = TwoInputs(), torch.randn(3, 6), torch.randn(3, 4)
    forms = {"tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": y}, "dict in another order": {"y": y, "x": x}}
    result = plain_merge(model, forms[form], ratio=0.0)
    assert torch.equal(result.module(x, y), model(x, y))
    assert torch.equal(result.module(y=y, x=x), model(x, y))
    assert plain_merge(model, forms[form]).module.a.out_features == 4


def test_an_embedding_that_renormalises_its_table_is_pinned() -> None:
    class Net(nn.Module):
        def __init__(self, max_norm: float | None) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(20, 8, max_norm=max_norm), nn.Linear(8, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(tokens))

    tokens = torch.arange(10).view(2, 5)
    assert [g.name for g in fxmerge.analyze(Net(None), tokens).groups] == ["table"]
    assert [g.name for g in fxmerge.analyze(Net(1.0), tokens).groups] == []


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"decomposition": "prune"}, {"decomposition": "fold"}, {}])
def test_no_tensor_is_shared_with_the_callers_model(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    merged = plain_merge(model, torch.zeros(2, 6), **options).module
    theirs, ours = ({t.untyped_storage().data_ptr() for t in [*m.parameters(), *m.buffers()]} for m in (model, merged))
    assert not theirs & ours


def test_a_forward_that_updates_its_input_leaves_the_callers_tensor_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(4, 6)
    before = x.clone()
    report = plain_merge(Net(), x, ratio=0.0).report
    assert report.after.parameters == report.before.parameters
    assert report.verdict.error == 0
    assert torch.equal(x, before)


@dataclass
class Scores:
    logits: Tensor
    name: str = "scores"


class Cache:
    """A class that is not registered with pytree."""


class Answering(nn.Module):
    """A model that returns an object made from its output by `wrap`."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(4, 8), nn.Linear(8, 3), wrap
        randomised(self, 1)

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.b(torch.relu(self.a(x))))


def test_tensors_in_a_dataclass_are_compared() -> None:
    model, x = Answering(Scores).eval(), torch.randn(5, 4)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    before, after = model(x).logits, result.module(x)
    found = next(t for t in vars(after).values() if isinstance(t, Tensor)) if isinstance(after, Scores) else after[0]
    assert result.report.verdict.error == pytest.approx(float((before - found).norm() / before.norm()), rel=0.5)
    assert result.report.verdict.error > 0.01


def test_what_is_left_out_of_the_output_is_reported() -> None:
    model, x = Answering(lambda y: {"y": y, "cache": Cache()}).eval(), torch.randn(5, 4)
    result = plain_merge(model, x, ratio=0.5)
    for report in (result.report, result.analysis.report):
        assert "left out of the output: Cache" in report.text()
