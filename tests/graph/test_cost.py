"""Parameters and FLOPs of nodes and of groups, compared with counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge.graph.cost import cost
from fxmerge.report.group_data import producer_cost
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 6  # of the inputs


class Attention(nn.Module):
    """Self-attention whose queries, keys and values are parts of one weight, and a feed-forward layer in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(3, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return F.linear(torch.relu(y @ self.up.transpose(0, 1)), self.down)


class Twice(nn.Module):
    """A layer that is called twice, a tied one, and a convolution without bias in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(10, 4, 3))
        self.inner, self.fc = nn.Linear(10, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(F.conv1d(x, self.conv, padding=1)).mean(2)
        return self.fc(torch.relu(self.inner(torch.relu(self.inner(y)))))


class Branching(nn.Module):
    """Control flow on values, which cannot be traced, around parts that can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.fc(y if float(y.sum()) > -1e9 else y * 2)


def costs(result: fxmerge.Result) -> dict[str, tuple[Any, Any]]:
    report = result.report
    return {g.name: (producer_cost(g, report.before), producer_cost(g, report.after)) for g in report.groups}


def total(module: nn.Module, *args: Any) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module.eval()(*args)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("exported", [False, True])
def test_attention_in_one_weight_and_layers_in_functions(exported: bool) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, ROWS // 2, 8)
    given: Any = torch.export.export(model, (x,)) if exported else model
    result = plain_merge(given, x, ratio=0.5)
    found = costs(result)
    feed_forward = next(v for k, v in found.items() if k.startswith("up"))
    # 12 rows of 8, then 6 of 4, since the attention's outputs are narrowed too, and a bias if the merge needed one
    assert feed_forward[0] == (12 * 8, 2 * ROWS * 12 * 8)
    assert feed_forward[1][1] == 2 * ROWS * 6 * 4 and feed_forward[1][0] in (6 * 4, 6 * 4 + 6)
    # one node computes queries, keys and values
    assert all(v[0] == (24 * 8 + 24, 2 * ROWS * 24 * 8) for k, v in found.items() if "in_proj" in k)


@pytest.mark.parametrize("exported", [False, True])
def test_a_layer_that_is_called_twice(exported: bool) -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(3, 4, 7)
    result = plain_merge(torch.export.export(model, (x,)) if exported else model, x, ratio=0.5)
    ((before, after),) = costs(result).values()
    # conv1d: 3 samples of 7 places; inner: 3 rows, twice, but its parameters once
    assert before == (10 * 4 * 3 + 10 * 10 + 10, 2 * 3 * 7 * 10 * 4 * 3 + 2 * (2 * 3 * 10 * 10))
    assert after[1] == 2 * 3 * 7 * 5 * 4 * 3 + 2 * (2 * 3 * 5 * 5)
    assert after[0] in (5 * 4 * 3 + 5 * 5 + 5, 5 * 4 * 3 + 5 * 5 + 5 + 5)


def test_a_model_that_was_recorded() -> None:
    torch.manual_seed(0)
    model, x = Branching().eval(), torch.randn(4, 5)
    result = plain_merge(model, x, ratio=0.5)
    assert result.analysis.captured.route == "recorded"
    found = costs(result)
    assert found["body.0"] == ((5 * 16 + 16, 2 * 4 * 5 * 16), (5 * 8 + 8, 2 * 4 * 5 * 8))
    assert result.report.before.flops == total(model, x)
    assert result.report.after.flops == total(result.module, x)


def test_a_recorded_graph_that_does_not_run_leaves_the_modules_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Branching().eval(), torch.randn(4, 5)
    result = plain_merge(model, x, ratio=0.5)
    expected = costs(result)["body.0"]
    fresh = plain_merge(model, x, ratio=0.5)

    def fails(module: fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("fxmerge.graph.cost.flops_by_node", fails)
    assert costs(fresh)["body.0"] == expected


class Queries(nn.Module):
    """A module takes a view of a parameter: torch's counter fails on it where parameters require gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.q, self.o = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o(self.q(self.latents.expand(x.shape[0], -1, -1)).relu() + x[:, None])
        return y


def test_a_module_that_takes_a_view_of_a_parameter() -> None:
    model, x = Queries().eval(), torch.randn(ROWS, 8)
    result = fxmerge.merge(model, x, ratio=0.5, samples=64)
    before, after = result.report.before.flops, result.report.after.flops
    assert before == 2 * ROWS * 4 * (8 * 8 + 8 * 3)
    assert after <= before and all(p.requires_grad for p in (*model.parameters(), *result.module.parameters()))


def test_all_nodes_together_are_the_whole() -> None:
    torch.manual_seed(0)
    for model, x in ((Attention(), torch.randn(2, 3, 8)), (Twice(), torch.randn(3, 4, 7))):
        captured = fxmerge.analyze(model.eval(), x).captured
        found = cost(captured.module, captured.inputs)
        parameters, flops = found.of(found.by_node)
        assert flops == found.flops == total(captured.module, x)
        assert parameters == found.parameters == sum(p.numel() for p in model.parameters())
    assert found.of(["inner", "inner", "gone"]) == found.of(["inner"]) == (110, 2 * 3 * 10 * 10)


def test_flops_that_are_not_known_are_not_zero() -> None:
    torch.manual_seed(0)
    captured = fxmerge.analyze(Twice().eval(), torch.randn(3, 4, 7)).captured
    known = cost(captured.module, captured.inputs)
    unknown = type(known)(known.parameters, known.flops, {
        name: type(node)(node.parameters, None) for name, node in known.by_node.items()
    })  # fmt: skip
    assert unknown.of(["inner"]) == (110, None)


def test_the_text_shows_the_costs_of_the_producers() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(3, 4, 7)
    result = plain_merge(torch.export.export(model, (x,)), x, ratio=0.5)
    ((before, after),) = costs(result).values()
    text = result.report.text(200)
    assert f"{before[0]:,} -> {after[0]:,}" in text and f"{before[1]:,} -> {after[1]:,}" in text
    assert "0 -> 0" not in text.replace(",000 -> 0", "")
