"""The bounds of rectifiers, in all spellings, on both routes."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration.epilogue import epilogue_of

SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float] | None]] = {
    "relu": (torch.relu, (0.0, inf)),
    "in place": (lambda x: x.relu_(), (0.0, inf)),
    "module": (nn.ReLU6(), (0.0, 6.0)),
    "relu6": (F.relu6, (0.0, 6.0)),
    "hardtanh module": (nn.Hardtanh(-2, 3), (-2.0, 3.0)),
    "hardtanh": (F.hardtanh, (-1.0, 1.0)),
    "hardtanh keywords": (lambda x: F.hardtanh(x, max_val=3.0), (-1.0, 3.0)),
    "clamp": (lambda x: x.clamp(0, 6), (0.0, 6.0)),
    "clamp keyword": (lambda x: torch.clamp(x, max=2), (-inf, 2.0)),
    "clamp_min": (lambda x: x.clamp_min_(0.5), (0.5, inf)),
    "clamp_max": (lambda x: torch.clamp_max(x, 3), (-inf, 3.0)),
    "tensor": (lambda x: x.clamp(torch.zeros(4)), None),
    "sigmoid": (torch.sigmoid, None),
    "leaky": (F.leaky_relu, None),
}


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.function, self.o = nn.Linear(3, 4), function, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.function(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_bounds(spelling: str, exported: bool) -> None:
    function, expected = SPELLINGS[spelling]
    model, x = Between(function).eval(), torch.randn(2, 3)
    captured = fxmerge.analyze(torch.export.export(model, (x,)) if exported else model, x).captured
    first = next(n for n in captured.module.graph.nodes if "linear" in n.name or n.name == "a")
    assert epilogue_of(captured.module, first, {}, set()).bounds == expected
    if expected is not None:  # against the function itself
        far = torch.tensor([-1e6, 1e6])
        if spelling != "tensor":
            assert function(far.clone()).tolist() == pytest.approx([max(expected[0], -1e6), min(expected[1], 1e6)])
