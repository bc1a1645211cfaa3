"""What a raw parameter does to an activation, and how its op is written in graphs and reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.ir.layer_ops import LayerOp
from tests.helpers.netmaking import Net, one_thread, randomised, raw  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = {
    "offset": lambda x, p: x + p,
    "offset-": lambda x, p: x - p,
    "offset-r": lambda x, p: p - x,
    "scale": lambda x, p: p * x,
    "scale/": lambda x, p: x / p,
    "scale/r": lambda x, p: p / x,
    "maximum": lambda x, p: torch.maximum(p, x),
}


@pytest.mark.parametrize("text", CALLS)
def test_an_op_is_known_by_its_call(text: str) -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.b(CALLS[text](m.a(x), m.p))
        return out

    model = randomised(Net(wiring, a=nn.Conv2d(3, 8, 1), p=raw(8, 1, 1), b=nn.Conv2d(8, 4, 1))).eval()
    found = fxmerge.analyze(model, torch.randn(2, 3, 4, 4))
    (layer,) = [layer for layer in found.facts.layers if layer.params == {"weight": "p"}]
    assert str(layer.operation) == text
    assert found.grouping.graph.nodes[f"layer:{layer.node}"]["kind"] == text


@pytest.mark.parametrize("text", CALLS)
def test_predicates_hold_of_the_function(text: str) -> None:
    """An offset shifts, a scale multiplies; `inverted` names the operand that enters as its inverse."""
    rule = {"offset": "add", "offset-": "sub", "offset-r": "sub", "scale": "mul"}.get(text, "div")
    op = LayerOp.of_binary(rule if text != "maximum" else text, parameter_first=text.endswith("r"))
    assert str(op) == text
    x, p = torch.tensor([2.0, 3.0]), torch.tensor([4.0, 5.0])
    y = CALLS[text](x, p)
    assert op.is_scale == torch.allclose(CALLS[text](2 * x, p), 2 * y)
    sign = -1 if op.inverted == "activation" else 1
    assert op.is_offset == torch.allclose(CALLS[text](x + 1, p), y + sign)
