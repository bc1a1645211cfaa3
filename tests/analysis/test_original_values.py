"""Values that are computed from sizes keep what the original's widths gave them, and follow all other sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.scaled_attention import HEADS, IN, SIZE, Scale, difference, halved

pytestmark = pytest.mark.usefixtures("one_thread")

SCALES: dict[str, Scale] = {
    "full": lambda m, q, v, w: w / torch.full([], v.size(-1) ** 0.5, dtype=w.dtype),
    "full by name": lambda m, q, v, w: w * torch.full(size=(1,), fill_value=v.shape[-1] ** -0.5, dtype=w.dtype),
    "a row of full": lambda m, q, v, w: w / torch.full((w.size(-1),), q.size(-1) ** 0.5, dtype=w.dtype),
    "new_tensor": lambda m, q, v, w: w * w.new_tensor(q.size(-1)).rsqrt(),
    "new_full": lambda m, q, v, w: w / w.new_full((), q.size(-1)).sqrt(),
    "new_ones": lambda m, q, v, w: w / w.new_ones(q.size(-1)).sum().sqrt(),
    "a tensor times a size": lambda m, q, v, w: w * torch.rsqrt(torch.full((), 1.0) * q.size(-1)),
    "the elements of arange": lambda m, q, v, w: w / torch.arange(q.size(-1)).numel() ** 0.5,
    "the sum of arange": lambda m, q, v, w: w * 9 / torch.arange(q.size(-1)).sum(),
    "the shape of a weight": lambda m, q, v, w: w / (m.q.weight.shape[0] / HEADS) ** 0.5,
    "the elements of a weight": lambda m, q, v, w: w / (m.q.weight.numel() / IN / HEADS) ** 0.5,
    "the elements of a bias": lambda m, q, v, w: w / (m.q.bias.numel() / HEADS) ** 0.5,
    "width times heads": lambda m, q, v, w: w / (q.shape[-1] * q.shape[1]) ** 0.5,
    "width times length": lambda m, q, v, w: w * 3 / (q.shape[-1] * q.shape[2]) ** 0.5,
    "a tensor of width times length": lambda m, q, v, w: w * 3 / w.new_tensor(q.shape[-1] * q.shape[2]).sqrt(),
    "a product of sizes": lambda m, q, v, w: w / math.prod(q.shape[-1:]) ** 0.5,
    "width, and positions": lambda m, q, v, w: w / q.size(-1) ** 0.5 - torch.arange(w.size(-1)) * 0.1,
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_stays(name: str) -> None:
    """The silent half is dropped, and the function stays, for other batch sizes and lengths too."""
    model, x = halved(SCALES[name]), torch.randn(2, 5, IN).double()
    result = plain_merge(model, x, ratio=0.5, decomposition="prune", selection="l2")
    assert result.module.get_submodule("q").out_features == HEADS * SIZE // 2
    assert difference(model, result.module, torch.randn(3, 7, IN).double()) < 1e-12


@pytest.mark.parametrize(
    "name", ["full", "new_tensor", "a tensor times a size", "width times length", "width, and positions"]
)
def test_a_scale_stays_in_an_exported_graph(name: str) -> None:
    model, x = halved(SCALES[name]), torch.randn(2, 5, IN).double()
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    exported: Any = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    result = plain_merge(exported, x, ratio=0.5, decomposition="prune", selection="l2")
    assert result.report.after.parameters < 0.6 * result.report.before.parameters
    assert difference(model, result.module, torch.randn(3, 7, IN).double()) < 1e-12


def test_refit_and_saving_of_a_graph_with_a_scale(tmp_path: Any) -> None:
    model, x = halved(SCALES["new_full"]), torch.randn(2, 5, IN).double()
    result = fxmerge.merge(model, x, ratio=0.5, decomposition="prune", calibration=[torch.randn(8, 5, IN).double()])
    assert difference(model, result.module, torch.randn(3, 7, IN).double()) < 1e-6
    result.save(tmp_path / "saved")
    again = fxmerge.load(tmp_path / "saved")
    assert difference(result.module, again, torch.randn(3, 7, IN).double()) < 1e-12


def test_a_value_that_cannot_be_kept_refuses_its_group_only() -> None:
    """The number of elements holds the batch size as well as the width, so no number could replace it."""
    model, x = (
        halved(lambda m, q, v, w: w / (q.numel() / w.size(0) / w.size(-1) / HEADS) ** 0.5),
        torch.randn(2, 5, IN).double(),
    )
    result = plain_merge(model, x, ratio=0.5, decomposition="prune", selection="l2")
    refused = {r.name: r for r in result.report.refusals}
    assert "takes a value computed from its width, which would change with it" in refused["q"].reason
    assert "numel" in refused["q"].where
    assert [p.name for p in result.plan.groups] == ["v"]
    assert difference(model, result.module, torch.randn(3, 7, IN).double()) < 1e-12


@pytest.mark.parametrize(
    "scale",
    [
        lambda m, q, v, w: w / q.shape[-1:].numel() ** 0.5,
        lambda m, q, v, w: w / (q.shape.numel() / q.shape[:-1].numel()) ** 0.5,
        lambda m, q, v, w: w / q.size()[2:].numel() * w.size(-1),
    ],
)
def test_the_number_of_elements_of_a_shape(scale: Scale) -> None:
    """A slice of a shape is not a tuple, which has no `numel`: the scale stays, or its group does."""
    model, x = halved(scale), torch.randn(2, 5, IN).double()
    result = plain_merge(model, x, ratio=0.5, decomposition="prune", selection="l2")
    assert [p.name for p in result.plan.groups] == ["v"]
    assert "q" in {r.name for r in result.report.refusals}
    assert difference(model, result.module, torch.randn(3, 7, IN).double()) < 1e-12


def test_states_of_a_new_size_still_follow() -> None:
    """zeros of a width become narrower with it."""

    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(IN, SIZE), nn.Linear(SIZE, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return self.b(y.view(y.shape[0], y.size(-1)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = State().eval(), torch.randn(2, IN)
    result = plain_merge(model, x, ratio=0.5)
    assert result.module.get_submodule("a").out_features == SIZE // 2
    assert result.module(torch.randn(5, IN)).shape == (5, 3)
