"""Norms with and without parameters: what is left is the net that one makes by hand with fewer channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

IN, WIDTH, SIDE = 6, 8, 4


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, norm: Any, spatial: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(IN, WIDTH, 1) if spatial else nn.Linear(IN, WIDTH)
        self.b = nn.Conv2d(WIDTH, 3, 1) if spatial else nn.Linear(WIDTH, 3)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))  # type: ignore[no-any-return]


MODULES: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "LayerNorm": (lambda n: nn.LayerNorm(n, elementwise_affine=False), False),
    "RMSNorm": (lambda n: nn.RMSNorm(n, elementwise_affine=False), False),
    "LayerNorm without bias": (lambda n: nn.LayerNorm(n, bias=False), False),
    "LayerNorm of an image": (lambda n: nn.LayerNorm([n, SIDE, SIDE], elementwise_affine=False), True),
    "GroupNorm": (lambda n: nn.GroupNorm(2, n, affine=False), True),
    "InstanceNorm": (lambda n: nn.InstanceNorm2d(n, affine=False), True),
    "BatchNorm": (lambda n: nn.BatchNorm2d(n, affine=False), True),
    "BatchNorm of the batch": (lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False), True),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "literal": lambda x: F.layer_norm(x, (WIDTH,)),
    "size": lambda x: F.layer_norm(x, [x.size(-1)]),
    "shape": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms": lambda x: F.rms_norm(x, (WIDTH,)),
}


def example(spatial: bool) -> Tensor:
    return torch.randn(5, IN, SIDE, SIDE) if spatial else torch.randn(5, IN)


def by_hand(model: Between, narrower: Any, kept: list[int], x: Tensor) -> Tensor:
    rows, columns = model.a.weight[kept], model.b.weight[:, kept]
    function: Any = F.conv2d if x.dim() == 4 else F.linear
    return function(F.relu(narrower(function(x, rows, model.a.bias[kept]))), columns, model.b.bias)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODULES)
def test_a_norm_without_parameters_follows(name: str) -> None:
    torch.manual_seed(0)
    make, spatial = MODULES[name]
    model, x = Between(make(WIDTH), spatial).eval(), example(spatial)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    kept = list(result.plan.groups[0].kept)
    assert len(kept) == WIDTH // 2
    narrower, unseen = make(WIDTH // 2).eval(), example(spatial)
    with torch.no_grad():
        assert torch.allclose(result.module(unseen), by_hand(model, narrower, kept, unseen), atol=1e-6)
    assert str(result.module.get_submodule("norm")) == str(narrower)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_without_weights_follows(name: str) -> None:
    torch.manual_seed(0)
    model, x = Between(FUNCTIONS[name], False).eval(), example(False)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    kept, unseen = list(result.plan.groups[0].kept), example(False)
    of_half = (lambda y: F.rms_norm(y, (WIDTH // 2,))) if name == "rms" else (lambda y: F.layer_norm(y, (WIDTH // 2,)))
    with torch.no_grad():
        assert torch.allclose(result.module(unseen), by_hand(model, of_half, kept, unseen), atol=1e-6)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"])
def test_a_norm_without_parameters_follows_in_an_exported_graph(name: str) -> None:
    torch.manual_seed(0)
    make, spatial = MODULES[name]
    model, x = Between(make(WIDTH), spatial).eval(), example(spatial)
    exported: Any = torch.export.export(model, (x,)).module()
    result = plain_merge(exported, x, ratio=0.5, decomposition="prune")
    kept, unseen = list(result.plan.groups[0].kept), example(spatial)
    assert len(kept) == WIDTH // 2
    with torch.no_grad():
        assert torch.allclose(result.module(unseen), by_hand(model, make(WIDTH // 2).eval(), kept, unseen), atol=1e-6)


def test_rms_norm_is_not_centred() -> None:
    """It divides by the root mean square and subtracts nothing: its layer says so, and statistics do not centre it."""
    from fxmerge.planning.channel_ops import _normalised

    found = fxmerge.analyze(Between(nn.RMSNorm(WIDTH), False).eval(), example(False))
    layer = next(layer for layer in found.facts.layers if layer.module == "norm")
    assert layer.op == "rms_norm"
    y = torch.randn(7, WIDTH).double() + 3
    assert torch.allclose(_normalised(y, layer.operation), F.rms_norm(y, (WIDTH,)), atol=1e-6)
