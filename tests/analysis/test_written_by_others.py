"""Nets as other people write them merge to the size of the same net written at half the width."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
import tests.helpers.attention_by_others
import tests.helpers.pictures_by_others  # noqa: F401
from fxmerge import verify
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.written_by_others import OTHERS, made

pytestmark = pytest.mark.usefixtures("one_thread")
every_net = pytest.mark.parametrize("name", OTHERS)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tensors(out: Any) -> list[Tensor]:
    if is_dataclass(out):
        return [t for f in fields(out) for t in tensors(getattr(out, f.name))]
    if isinstance(out, dict):
        return [t for v in out.values() for t in tensors(v)]
    if isinstance(out, (list, tuple)):
        return [t for v in out for t in tensors(v)]
    return [out]


@every_net
def test_merges_to_the_half_width_net(name: str) -> None:
    """As many parameters as the net has that its author would write at half the width, and the same shapes out."""
    model, example, args, kwargs = made(name)
    result = plain_merge(model, example, ratio=0.5, scope="all")
    with torch.no_grad():
        before, after = model(*args, **kwargs), result.module(*args, **kwargs)
    assert [t.shape for t in tensors(after)] == [t.shape for t in tensors(before)]
    assert all(bool(torch.isfinite(t).all()) for t in tensors(after))
    assert parameters(result.module) == parameters(OTHERS[name](1)), result.report.text()
    refused = {r.name: r.reason for r in result.report.refusals}
    for layer, reason in OTHERS[name].stays.items():  # type: ignore[attr-defined]
        assert refused[layer] == reason


@every_net
def test_permutation(name: str) -> None:
    model, example, _, _ = made(name)
    found = fxmerge.analyze(model, example)
    moved = verify.permutation(found.captured, found.facts, found.grouping)
    assert moved
    assert max(moved.values()) < 1e-10


@every_net
def test_keeping_all_gives_the_same_bits(name: str) -> None:
    model, example, args, kwargs = made(name)
    result = plain_merge(model, example, ratio=0.0)
    with torch.no_grad():
        one, other = tensors(model(*args, **kwargs)), tensors(result.module(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert parameters(result.module) == parameters(model)


@pytest.mark.parametrize("name", ["TupleOutput", "DictOutput", "NamedOutput"])
def test_what_comes_back_is_of_the_users_kind(name: str) -> None:
    model, example, args, _ = made(name)
    before, after = model(*args), plain_merge(model, example, ratio=0.5).module(*args)
    assert type(after) is type(before)
    if isinstance(before, dict):
        assert list(after) == list(before)


@pytest.mark.parametrize("decomposition", ["mostsim", "fold", "lstsq", "prune"])
def test_a_tied_embedding_is_not_mixed(decomposition: str) -> None:
    """Its columns are the producer's rows: what the head absorbs, the words would be changed by."""
    model, example, _, _ = made("TiedEmbedding")
    result = plain_merge(model, example, ratio=0.5, decomposition=decomposition)
    kept = next(list(p.kept) for p in result.plan.groups if p.name == "e")
    assert torch.equal(result.module.e.weight, model.e.weight[:, kept])  # type: ignore[union-attr, index, arg-type]
    assert result.module.head.weight is result.module.e.weight  # type: ignore[union-attr]
