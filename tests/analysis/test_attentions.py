"""The key-value cache: what attentions store of each token is found, priced and cut, whatever they are written with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear

import fxmerge
from fxmerge import FxMergeError
from fxmerge.analysis.attentions import attentions
from tests.helpers.language_models import llama
from tests.helpers.netmaking import Net, conv, one_thread, plain_merge, randomised, raw  # noqa: F401
from tests.helpers.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")

T, D = 6, 8


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def sdpa(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(heads(m.q(x), 4), value=heads(m.v(x), 4), key=heads(m.k(x), 4))
    return m.o(y.transpose(1, 2).flatten(2))


def products(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(layer(x), 4) for layer in (m.q, m.k, m.v))
    w = (torch.matmul(q, k.transpose(-1, -2)) / 3 + m.bias).softmax(-1)
    return m.o((w @ v).transpose(1, 2).flatten(2))


def letters(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (4, -1)) for layer in (m.q, m.k, m.v))
    w = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
    return m.o(torch.einsum("bshe,bhts->bthe", v, w).flatten(2))


def grouped(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2), enable_gqa=True)
    return m.o(y.transpose(1, 2).flatten(2))


def repeated(m: Any, x: Tensor) -> Tensor:
    """The rotation's table comes first and is as long as all heads, so that the products have its labels."""
    def turned(t: Tensor) -> Tensor:
        cos, sin = (table.expand(-1, t.size(1), -1, -1) for table in (m.angles.cos(), m.angles.sin()))
        return cos * t + sin * torch.cat([-t[..., 4:], t[..., :4]], -1)

    q, k = turned(heads(m.q(x), 4)), turned(heads(m.k(x), 2)).repeat_interleave(2, 1)
    w = (q @ k.mT).softmax(-1)
    return m.o((w @ heads(m.v(x), 2).repeat_interleave(2, 1)).transpose(1, 2).flatten(2))


def across(m: Any, x: Tensor) -> Tensor:
    """Two attentions that share keys and values, and one whose keys are computed from positions alone."""
    k, v = heads(m.k(x), 4), heads(m.v(x), 4)
    for q in (m.q, m.q2):
        x = x + m.o(F.scaled_dot_product_attention(heads(q(x), 4), k, v).transpose(1, 2).flatten(2))
    p = heads(m.k2(m.positions(torch.arange(x.size(1)))[None]), 1)
    return x + (heads(m.q3(x), 1) @ p.mT).softmax(-1)[:, 0] @ m.v3(x)


def four(**more: nn.Module | Tensor) -> dict[str, Any]:
    return {"q": Linear(16, 32), "k": Linear(16, 32), "v": Linear(16, 32), "o": Linear(32, 16), **more}


def two() -> dict[str, Any]:
    return four(k=Linear(16, 16), v=Linear(16, 16))


# a forward function, its layers, and the layers whose outputs are stored for each token
NETS: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "sdpa": (sdpa, four, ("k", "v")),
    "products": (products, lambda: four(bias=raw(T, T)), ("k", "v")),
    "letters": (letters, four, ("k", "v")),
    "grouped": (grouped, two, ("k", "v")),
    "repeated": (repeated, lambda: two() | {"angles": torch.randn(1, 1, T, D)}, ("k", "v")),
    "across": (across, lambda: four(q2=Linear(16, 32), q3=Linear(16, 8), k2=Linear(16, 8), v3=Linear(16, 16),
                                    positions=nn.Embedding(T, 16)), ("k", "v", "v3")),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor, tuple[str, ...]]:
    torch.manual_seed(0)
    forward, layers, stored = NETS[name]
    inner = layers()
    model = Net(forward, **inner)
    return randomised(model).eval(), torch.randn(2, T, 16), stored


def stored_numbers(model: nn.Module, x: Tensor, stored: tuple[str, ...]) -> int:
    """The numbers per token that hooks see in the outputs of these layers."""
    seen: dict[str, int] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.size(-1)}))
        for name in stored
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(seen.values())


@pytest.mark.parametrize("name", NETS)
def test_what_is_stored_is_found_and_halved(name: str) -> None:
    model, x, stored = made(name)
    whole = stored_numbers(model, x, stored)
    found = fxmerge.analyze(model, x)
    everything = torch.ones(found.facts.label_count, dtype=torch.bool)
    assert sum(one.stored(everything) for one in attentions(found.captured, found.facts)) == 4 * whole
    result = plain_merge(model, x, budget={"cache": 0.5})
    spent = result.report.spent
    assert spent is not None and spent.left == pytest.approx(stored_numbers(result.module, x, stored) / whole)
    assert spent.left == pytest.approx(0.5, rel=0.01) or result.report.notes
    assert spent.left <= 0.505
    assert {g.name for g in result.plan.groups} <= {"q", "k", "v", "q2", "v3"}  # nothing else saves any of it


def test_double_precision_stores_twice_the_bytes() -> None:
    model, x, _ = made("sdpa")
    found = fxmerge.analyze(model.double(), x.double())
    everything = torch.ones(found.facts.label_count, dtype=torch.bool)
    assert [one.stored(everything) for one in attentions(found.captured, found.facts)] == [8 * 64]


@pytest.mark.parametrize("options", slow_but([{}], [{}, {"heads": "whole"}]), ids=str)
def test_the_cache_of_a_language_model(options: dict[str, Any]) -> None:
    """What the merged Llama hands back as `past_key_values` is half as large."""
    model, x = llama(), {"input_ids": torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))}

    def size(m: nn.Module) -> int:
        with torch.no_grad():
            cache = m(**x, use_cache=True).past_key_values
        return sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))

    result = plain_merge(model, x, budget={"cache": 0.5}, allocation="uniform", **options)
    assert result.model is not None
    assert size(result.model) / size(model) == pytest.approx(0.5, rel=0.01)
    assert "50.0% of the key-value cache requested, 50.0% left, within 1%" in result.report.text(200)
    assert not any("mlp" in g.name for g in result.plan.groups)
    assert json.loads(result.report.json())["budget"]["kind"] == "cache"
    one = plain_merge(model, x, budget={"cache": 0.5}, of="model.layers.1", allocation="uniform", heads="whole")
    assert [g.name.split(".")[2] for g in one.plan.groups] == ["1"]


def image(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.c(x)).flatten(2)
    return m.fc((x @ x.mT).flatten(1))  # correlations of channels: no attention


def test_models_without_attention_are_told() -> None:
    model = randomised(Net(image, c=conv(3, 8), fc=Linear(64, 4))).eval()
    with pytest.raises(FxMergeError, match=r"a share of the key-value cache, but the model has none: .* no attention"):
        plain_merge(model, torch.randn(1, 3, 6, 6), budget={"cache": 0.5})
