"""Channels that are laid out along several axes keep their places along those that matter, in whatever layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge import verify
from tests.helpers.head_layouts import EXACT, IN, MIXING, Last, LengthByHand, Mixed, Rotary
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.silencing import error_of_silence

pytestmark = pytest.mark.usefixtures("one_thread")


def made(cls: type[nn.Module]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = cls().eval().double()
    with torch.no_grad():  # scores that matter
        for name, value in model.named_parameters():
            value.mul_(2 if name[0] in "qkv" else 1)
    return model, torch.randn(2, 5, IN).double(), torch.randn(3, 5, IN).double()


@pytest.mark.parametrize("heads", ["width", "whole", "both"])
@pytest.mark.parametrize("cls", EXACT, ids=lambda c: c.__name__)
def test_what_leaves_is_silent(cls: type[nn.Module], heads: str) -> None:
    """Without a mixer, dropping is exact: the merged model is the original with the dropped channels silenced."""
    model, x, unseen = made(cls)
    selection = "l2" if heads == "both" else "random"
    error, result = error_of_silence(model, x, unseen, ratio=0.5, selection=selection, heads=heads, seed=3)
    assert error < 1e-12
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-12
    if heads == "width" or cls not in (Rotary, Mixed):  # whose heads do not leave whole
        attention = [p for p in result.plan.groups if p.name != "o"]
        assert attention
        assert all(len(p.kept) < p.channels for p in attention)


@pytest.mark.parametrize("heads", ["width", "whole"])
@pytest.mark.parametrize("cls", MIXING, ids=lambda c: c.__name__)
def test_places_hold_where_channels_are_mixed(cls: type[nn.Module], heads: str) -> None:
    """A permutation of a group's channels commutes with a mixer, if they are in places that it treats alike."""
    model, x, _ = made(cls)
    result = plain_merge(model, x, ratio=0.5, selection="random", heads=heads, seed=1)
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-12


def test_a_softmax_over_channels_of_narrower_heads() -> None:
    """Heads leave whole from a softmax over each head's channels: the other heads do not notice."""
    model, x, unseen = made(next(c for c in MIXING if c.__name__ == "SoftmaxOfSizes"))
    error, result = error_of_silence(model, x, unseen, ratio=0.5, selection="random", seed=2)
    assert error < 1e-12
    assert {p.name: (p.channels, len(p.kept)) for p in result.plan.groups}["q"] == (4, 2)


def test_refit_of_heads_that_come_last() -> None:
    """Refit solves each layer on the narrower heads; on the batches that it saw, the error becomes smaller."""
    model, x, _ = made(Last)
    batches = [torch.randn(16, 5, IN).double() for _ in range(4)]
    plain = plain_merge(model, x, ratio=0.5, decomposition="prune")
    refitted = fxmerge.merge(model, x, ratio=0.5, selection="repair", decomposition="prune", calibration=batches)
    seen = torch.cat(batches)
    with torch.no_grad():
        y, worse, better = model(seen), plain.module(seen), refitted.module(seen)
    assert [len(p.kept) for p in refitted.plan.groups] == [4, 4, 6]
    assert (better - y).norm() < 0.85 * (worse - y).norm()


def test_groups_that_cannot_lose_a_channel_are_refused_with_the_line() -> None:
    """One number for each head meets its channels: heads stay, and each head is one channel."""
    model, x, _ = made(LengthByHand)
    refused = {r.name: r for r in fxmerge.analyze(model, x).refusals}
    for name in ("q", "k"):
        assert "must lose equally many channels, and none has two to choose from" in refused[name].reason
        assert "view" in refused[name].where


def test_a_narrower_model_made_by_hand_has_the_same_layout() -> None:
    """Queries of 4 of 8 places, in all heads: the same as rows of the weight seen as (places, heads, in)."""
    model, x, _ = made(Last)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune", selection="random", seed=5)
    kept = {p.name: list(p.kept) for p in result.plan.groups}
    parts: Any = dict(result.module.named_parameters())
    own = dict(model.named_parameters())
    for name, group in (("q", "q"), ("k", "q"), ("v", "v")):
        expected = own[f"{name}.weight"].view(8, 4, IN)[kept[group]].reshape(-1, IN)
        assert torch.equal(parts[f"{name}.weight"], expected)
