"""torch.save and torch.load of a merged module, however its graph was captured."""

import io

import pytest
import torch
from torch import Tensor, nn

import fxmerge


class Branching(nn.Module):
    """Two layers, with a branch on a shape if `captured_by` is torch.export, which torch.fx's tracer cannot follow."""

    def __init__(self, captured_by: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.branches = captured_by == "torch.export"

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.shape[-1] > 6:
            x = x[..., :6]
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("captured_by", ["torch.export", "torch.fx"])
def test_a_merged_module_survives_torch_save(captured_by: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    module = fxmerge.merge(Branching(captured_by), x, ratio=0.5, refit="none").module
    aten = any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)
    assert aten == (captured_by == "torch.export")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)
