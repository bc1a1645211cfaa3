"""Weights computed by torch.nn.utils are merged like plain parameters with the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxmerge
from fxmerge import verify
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Positive(nn.Module):
    """A user-defined parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


WAYS: dict[str, Callable[[Any], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of positions": lambda m: parametrizations.weight_norm(m, dim=2),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda m: parametrize.register_parametrization(m, "weight", Positive()),
    "two": lambda m: parametrize.register_parametrization(parametrizations.weight_norm(m), "bias", Positive()),
}


def net(way: str | None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 12, 3), nn.ReLU(), nn.Conv1d(12, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 1)).double()
    randomised(model)
    if way is not None:
        WAYS[way](model[2])
    return model.eval(), torch.randn(2, 3, 9, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
def test_equals_the_merge_of_the_plain_model(way: str) -> None:
    """The result is the same as if the user had removed the parametrization first."""
    model, x = net(way)
    plain = copy.deepcopy(net(way)[0])
    for name in list(plain[2].parametrizations):  # type: ignore[index, union-attr]
        parametrize.remove_parametrizations(plain[2], name)  # type: ignore[index]
    result, expected = plain_merge(model, x), plain_merge(plain, x)
    assert [(p.name, p.kept) for p in result.plan.groups] == [(p.name, p.kept) for p in expected.plan.groups]
    assert {p.channels for p in result.plan.groups} == {12, 8}
    with torch.no_grad():
        assert torch.equal(result.module(x), expected.module(x))
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10


def masked(model: nn.Module) -> nn.Module:
    """Twice, so that a hook holds two masks; and a bias."""
    prune.random_unstructured(model[2], "weight", 0.3)  # type: ignore[index]
    prune.ln_structured(model[2], "weight", 0.25, n=2, dim=0)  # type: ignore[index]
    prune.l1_unstructured(model[0], "bias", 3)  # type: ignore[index]
    return model


def test_masks_of_torch_are_folded() -> None:
    """The result is that of the model whose masks the user made permanent; the user's own keeps its masks."""
    (model, x), (plain, _) = (net(None) for _ in range(2))
    torch.manual_seed(1)
    masked(model)
    torch.manual_seed(1)
    for layer, name in ((masked(plain)[2], "weight"), (plain[0], "bias")):  # type: ignore[index]
        prune.remove(layer, name)
    state = copy.deepcopy(model.state_dict())
    result, expected = plain_merge(model, x), plain_merge(plain, x)
    assert [(p.name, p.kept) for p in result.plan.groups] == [(p.name, p.kept) for p in expected.plan.groups]
    assert {p.channels for p in result.plan.groups} == {12, 8}
    with torch.no_grad():
        assert torch.equal(result.module(x), expected.module(x))
    assert set(dict(result.module.named_buffers())) == set()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in state.items())
    assert prune.is_pruned(model)


@pytest.mark.parametrize("way", WAYS)
def test_the_users_model_is_left_alone(way: str) -> None:
    model, x = net(way)
    cls, state = type(model[2]), copy.deepcopy(model.state_dict())  # type: ignore[index]
    with torch.no_grad():
        before = model(x)
    fxmerge.merge(model, x, refit="none")
    assert type(model[2]) is cls  # type: ignore[index]
    assert parametrize.is_parametrized(model[2])  # type: ignore[index]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in state.items())
    with torch.no_grad():
        assert torch.equal(model(x), before)
    model.train()
    model(x).sum().backward()
    assert any(p.grad is not None for p in model[2].parametrizations.parameters())  # type: ignore[index, union-attr]


def test_the_merged_model_can_be_trained() -> None:
    model, x = net("weight_norm")
    merged = fxmerge.merge(model, x, refit="none").module
    assert all(p.requires_grad for p in merged.parameters())
    merged(x).sum().backward()
    assert all(p.grad is not None for p in merged.parameters())


@pytest.mark.parametrize("way", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("ran", [False, True])
def test_older_hooks(way: Callable[[Any], Any], ran: bool) -> None:
    """A hook computes the weight before each forward; before the first forward the weight may have a grad_fn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 12, 3), nn.ReLU(), nn.Conv1d(12, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 1)).double()
    randomised(model)
    way(model[2])
    model, x = model.eval(), torch.randn(2, 3, 9, dtype=torch.float64)
    if ran:
        model(x)
    names = set(model.state_dict())
    result = plain_merge(model, x, decomposition="prune")
    assert set(model.state_dict()) == names and len(model[2]._forward_pre_hooks) == 1
    assert {p.name: len(p.kept) for p in result.plan.groups} == {"0": 6, "2": 4}
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    with torch.no_grad():
        kept = plain_merge(model, x, ratio=0.0)
        torch.testing.assert_close(kept.module(x), model(x), rtol=1e-12, atol=1e-12)
