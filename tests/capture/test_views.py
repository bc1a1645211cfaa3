"""Views in exported graphs, of tensors whose memory other kernels, dtypes and widths lay out differently."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge


class Attention(nn.Module):
    """torch.export leaves out the `contiguous`: on the example, attention's output is laid out so already."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(b, t, -1))
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_narrower_than_queries(dtype: torch.dtype) -> None:
    """Attention then has another kernel, whose output has other strides."""
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():  # half of the values are never read
        model.o.weight.view(16, 2, 8)[:, :, 1::2] = 0
    program = torch.export.export(model, (x,))
    result = fxmerge.merge(program, x, ratio=0.5, ignore=("q", "k"), refit="none")
    assert result.module.get_parameter("v.weight").shape == (8, 16)
    merged, wanted = copy.deepcopy(result.module).to(dtype), copy.deepcopy(model).to(dtype)(x.to(dtype))
    rough = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(merged(x.to(dtype)), wanted, rtol=rough, atol=rough)


class Updating(nn.Module):
    """What is written into a view is written into what is viewed."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.parts = nn.Linear(6, 8), nn.Linear(8, 4), parts

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        seen = h.view(4, -1)
        if self.parts:
            h.view(-1).chunk(2)[1].zero_()
        else:
            h.view(-1)[:3].zero_()
        y: Tensor = self.fc2(h) + seen.sum()
        return y


@pytest.mark.parametrize("parts", [False, True])
def test_views_that_are_written_into_stay(parts: bool) -> None:
    torch.manual_seed(0)
    model, x = Updating(parts).eval(), torch.randn(2, 6)
    with torch.no_grad():
        module = fxmerge.merge(torch.export.export(model, (x,)), x, ratio=0.0, refit="none").module
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x))
    assert isinstance(module, torch.fx.GraphModule)
    assert [node.target for node in module.graph.nodes].count(torch.ops.aten.view.default) == 2
