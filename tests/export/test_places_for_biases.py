"""Biases that refit gives to layers without one, where the class has no place for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge


class Router(nn.Module):
    """As in transformers: a weight, and a function call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).softmax(-1)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(12, 40, bias=False), Router(40)
        self.parts = nn.ModuleList(nn.Linear(40, 6, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        shares = self.router(h)
        y: Tensor = torch.stack([part(h) for part in self.parts], -1) @ shares[:, :, None]
        return y


class Functional(nn.Module):
    """Nothing but function calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Router(12), nn.Parameter(torch.randn(20, 4))
        self.third = nn.Parameter(torch.randn(3, 20) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(F.linear(self.first(x), self.second)), self.third)


def names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("own", [False, True])
def test_a_class_is_worth_more_than_the_bias_of_a_router(own: bool) -> None:
    """The router has 160 of 1,600 weights, which are not few: its class is kept only if asked for."""
    torch.manual_seed(0)
    net, x = Gated().eval(), torch.randn(64, 12)
    options: dict[str, Any] = {"ratio": 0.5, "samples": 64, "own_class": own}
    result = fxmerge.merge(net, x, **options)
    assert sum(p.numel() for p in net.parameters()) < 160 / 0.05
    assert (type(result.model) is Gated) == own
    assert ("router.weight_bias" in names(result.module)) != own
    assert "parts.0.bias" in names(result.module)
    if result.model is not None:
        assert "parts.0.bias" in names(result.model)
        torch.testing.assert_close(result.model(x), result.module(x))


def test_few_weights_without_a_place_for_a_bias_get_none() -> None:
    torch.manual_seed(0)
    net, x = Gated().eval(), torch.randn(64, 12)
    net.parts = nn.ModuleList(nn.Linear(40, 30, bias=False) for _ in range(4))  # 160 of 5,440 weights
    result = fxmerge.merge(net, x, ratio=0.5, samples=64)
    assert type(result.model) is Gated
    assert names(result.model) == names(net) | {f"parts.{i}.bias" for i in range(4)}
    torch.testing.assert_close(result.model(x), result.module(x))


@pytest.mark.parametrize("own", [False, True])
def test_networks_of_function_calls_get_biases_unless_the_class_is_asked_for(own: bool) -> None:
    torch.manual_seed(0)
    net, x = Functional().eval(), torch.randn(64, 12)
    result = fxmerge.merge(net, x, ratio=0.5, samples=64, own_class=own)
    assert (type(result.model) is Functional) == own
    assert any(name.endswith("_bias") for name in names(result.module)) != own
    hint = "with own_class=True, layers whose class has no place for a bias get none"
    assert (hint in " ".join(result.report.text(400).split())) != own
    traced = fxmerge.merge(torch.fx.symbolic_trace(net), x, ratio=0.5, samples=64, own_class=own)  # has no class
    assert any(name.endswith("_bias") for name in names(traced.module))
