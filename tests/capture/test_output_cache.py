"""The shortcuts of capture: deep_copy equals copy.deepcopy, and cached outputs are used only where they are valid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.capture.output_cache import OutputCache
from fxmerge.weights.copy import deep_copy


class Odd(nn.Module):
    """A module with attributes that modules do not usually have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.listed, self.shared = [1, [2]], {"a": [self.first]}
        self.alias = self.shared
        self.raw, self.sizes, self.none = torch.ones(2), (1, (2, 3)), None
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.first.register_forward_hook(lambda m, a, o: o + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.again(x)) + self.raw.sum()


class Stubborn(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Stubborn:
        return self


def test_deep_copy_equals_deepcopy_except_for_shared_tensors() -> None:
    odd = Odd().train()
    odd.stubborn = Stubborn(2, 2)
    copied = deep_copy(odd, odd.parameters())
    assert type(copied) is Odd and copied.first is copied.again and copied.first is not odd.first
    assert copied.tied.weight is copied.first.weight is odd.first.weight
    assert copied.alias is copied.shared and copied.shared is not odd.shared
    assert copied.shared["a"][0] is copied.first and copied.listed == odd.listed
    assert copied.listed is not odd.listed and copied.listed[1] is not odd.listed[1]
    assert copied.stubborn is odd.stubborn and copied.training and copied.sizes == odd.sizes
    for name in ("raw", "kept", "passing"):
        assert getattr(copied, name) is not getattr(odd, name)
    assert list(copied.state_dict()) == list(odd.state_dict()) and "passing" not in copied.state_dict()
    x = torch.randn(2, 3)
    assert torch.equal(copied(x), odd(x))
    assert copied.first._forward_hooks is not odd.first._forward_hooks and len(copied.first._forward_hooks) == 1


@pytest.mark.parametrize("seed", range(3))
def test_deep_copy_of_everything(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    one, other = deep_copy(net, ()), copy.deepcopy(net)
    for mine, theirs in zip(one.modules(), other.modules(), strict=True):
        assert list(mine.__dict__) == list(theirs.__dict__)
    for mine, original in zip(one.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(mine, original) and mine.data_ptr() != original.data_ptr()


def cached(layer: nn.Module, x: torch.Tensor) -> OutputCache:
    cache = OutputCache()
    with torch.no_grad(), cache.watching(layer):
        layer(x)
    return cache


def test_the_cache_returns_an_output_once_and_only_for_the_same_bits() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    cache = cached(layer, x)
    assert not layer._forward_hooks
    assert cache.output(layer, (x + 1e-6,)) is None and cache.output(layer, (x[:1],)) is None
    assert cache.output(layer, (x.double(),)) is None and cache.output(nn.Linear(8, 8), (x,)) is None
    found = cache.output(layer, (x.clone(),))
    assert found is not None and torch.equal(found, layer(x))
    assert cache.output(layer, (x,)) is None


@pytest.mark.parametrize("slot", ["weight", "bias"])
def test_the_cache_forgets_a_layer_whose_parameters_changed(slot: str) -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    cache = cached(layer, x)
    with torch.no_grad():
        getattr(layer, slot).add_(1)
    assert cache.output(layer, (x,)) is None


def test_the_cache_holds_no_more_than_the_weights() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(5, 8)  # 144 parameters, 80 elements per call
    with torch.no_grad():
        cache = cached(net, x)
        assert cache.output(net[1], (net[0](x),)) is None
        assert cache.output(net[0], (x,)) is not None


class Derived(nn.Linear):
    pass


@pytest.mark.parametrize("kind", ["derived", "hooked", "patched", "parametrized"])
def test_the_cache_leaves_out_layers_that_may_do_anything(kind: str) -> None:
    layer, x = (Derived if kind == "derived" else nn.Linear)(8, 8), torch.randn(2, 8)
    if kind == "hooked":
        layer.register_forward_pre_hook(lambda m, args: None)
    if kind == "patched":
        layer.forward = lambda x: x  # type: ignore[method-assign]
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(layer)
    assert not cached(layer, x).calls


def test_a_graph_that_reads_another_input_is_still_refused() -> None:
    """The graph calls the same modules as the model, but with other inputs."""

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.calls = nn.Linear(16, 16), nn.Linear(16, 16), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.two(self.one(x) * self.calls)

    with pytest.raises(fxmerge.FxMergeError, match="two runs of Changing on the same inputs differ"):
        fxmerge.analyze(Changing().eval(), torch.randn(1, 16))
