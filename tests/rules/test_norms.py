"""Norms with and without parameters: what is left is the net that one makes by hand with fewer channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import Options, Plan, verify
from fxmerge.plan import GroupPlan
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
    "GroupNorm of single channels": (lambda n: nn.GroupNorm(n, n, affine=False), True),
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


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "GroupNorm of single channels", "BatchNorm"])
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


@pytest.mark.parametrize("function", [False, True])
def test_groups_of_one_channel_are_an_instance_norm(function: bool) -> None:
    """No channel depends on another: they permute freely, and a copy with another scale is merged exactly."""

    class Net(Between):
        def forward(self, x: Tensor) -> Tensor:
            y, n = self.a(x), self.norm
            y = F.group_norm(y, WIDTH, n.weight, n.bias, n.eps) if function else n(y)
            return self.b(F.relu(y))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Net(nn.GroupNorm(WIDTH, WIDTH, eps=0.0), True).double().eval(), example(True).double()
    with torch.no_grad():
        for value in (model.norm.weight, model.norm.bias):
            value.uniform_(0.5, 2.0)
            value[4:] = value[:4]
        for value in model.a.parameters():
            value[4:] = 3 * value[:4]
    unseen = example(True).double()
    found = fxmerge.analyze(model, x)
    assert verify.permutation(found.captured, found.facts, found.grouping)["a"] < 1e-12
    assert not found.groups[0].mixers
    kept = GroupPlan("a", WIDTH, (0, 1, 2, 3))
    result = fxmerge.apply(Plan(Options(refit="none", decomposition="mostsim"), (kept,)), model, x)
    with torch.no_grad():
        assert torch.allclose(result.module(unseen), model(unseen), atol=1e-9)
        result = fxmerge.apply(Plan(Options(refit="none", decomposition="prune"), (kept,)), model, x)
        assert not torch.allclose(result.module(unseen), model(unseen), atol=1e-2)


def test_rms_norm_is_not_centred() -> None:
    """It divides by the root mean square and subtracts nothing: its layer says so, and statistics do not centre it."""
    from fxmerge.planning.channel_ops import _normalised

    found = fxmerge.analyze(Between(nn.RMSNorm(WIDTH), False).eval(), example(False))
    layer = next(layer for layer in found.facts.layers if layer.module == "norm")
    assert layer.op == "rms_norm"
    y = torch.randn(7, WIDTH).double() + 3
    assert torch.allclose(_normalised(y, layer.operation), F.rms_norm(y, (WIDTH,)), atol=1e-6)
