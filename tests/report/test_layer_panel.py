"""The weights and attributes that the page shows of each layer, compared with those of the modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from tests.helpers.drawings import blocks, data_of
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


def tables(report: Any) -> dict[str, dict[str, Any]]:
    """By layer."""
    data = data_of(report.html())
    return {
        name: data["tables"][number]
        for box in data["boxes"]
        for name, number in zip(box["modules"], box["tables"], strict=True)
    }


@pytest.mark.parametrize("name", NETS)
def test_shapes_of_all_weights(name: str) -> None:
    model, x = NETS[name]()
    result = plain_merge(model, x, ratio=0.5)
    before, after = (m.state_dict() for m in (model, result.module))
    seen = 0
    for layer, table in tables(result.report).items():
        for slot, shape, *merged in table["weights"]:
            path = layer if layer in before and slot == "weight" else f"{layer}.{slot}"
            if path not in before or path not in after:
                continue  # the bias of a function has a path of its own
            seen += 1
            assert shape == [*before[path].shape], path
            assert (merged[0] if merged else shape) == [*after[path].shape], path
    assert seen


def test_attributes_before_and_after() -> None:
    model, x = NETS["residual"]()
    table = tables(plain_merge(model, x, ratio=0.5).report)["b"]
    rows = {row[0]: row[1:] for row in table["attributes"]}
    assert rows["in_channels"] == [16, 8]
    assert rows["out_channels"] == [12, 6]
    assert rows["padding_mode"] == ["zeros"]
    assert "training" not in rows
    assert table["op"] == "Conv2d"


class Functional(nn.Module):
    """Layers as functions of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(12, 3, 3, 3))
        self.second = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.first, stride=2, padding=1)
        return self.second(F.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_arguments_of_functions() -> None:
    torch.manual_seed(0)
    found = tables(plain_merge(Functional().eval(), torch.randn(2, 3, 8, 8), ratio=0.5).report)
    (conv,) = (table for table in found.values() if "conv2d" in table["op"])
    rows = {row[0]: row[1] for row in conv["attributes"]}
    assert (rows["stride"], rows["padding"]) == (2, 1)
    assert [*conv["weights"][0][1:]] == [[12, 3, 3, 3], [6, 3, 3, 3]]
    assert conv["output"] == [2, 12, 4, 4]
    assert conv["dtype"] == "float32"


def test_a_bias_that_is_new() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False)).eval()
    result = plain_merge(model, torch.randn(4, 5), ratio=0.5, decomposition="lstsq")
    assert "2.bias" in result.module.state_dict()
    assert ["bias", None, [3]] in tables(result.report)["2"]["weights"]


def test_repeated_layers_share_a_table() -> None:
    data = data_of(blocks().report.html())
    numbers = {n for box in data["boxes"] if "blocks" in box["modules"][0] for n in box["tables"]}
    assert len([box for box in data["boxes"] if "blocks" in box["modules"][0]]) == 18
    assert len(numbers) <= 4


def test_an_analysis_has_no_second_shape() -> None:
    model, x = NETS["residual"]()
    for table in tables(fxmerge.analyze(model, x).report).values():
        assert all(len(row) == 2 for row in (*table["weights"], *table["attributes"]))
