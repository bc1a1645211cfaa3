"""The expansions of torch's transformer layers, compared with the layers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.capture.symbolic import symbolic, without_rule
from fxmerge.graph.compare import difference, outputs
from fxmerge.graph.eval_mode import reproducible
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HEADS, LONG, SHORT = 8, 2, 6, 4


class Calling(nn.Module):
    """A layer between two linear layers, called with masks that the model creates."""

    def __init__(self, layer: nn.Module, **masks: Tensor | bool) -> None:
        super().__init__()
        self.a, self.layer, self.b, self.masks = nn.Linear(5, WIDTH), layer, nn.Linear(WIDTH, 3), masks

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        given = [self.a(x), *([self.a(y)] if y is not None else [])]
        if isinstance(self.layer, nn.MultiheadAttention):
            query, key = given[0], given[-1]
            return self.b(self.layer(query, key, key, need_weights=False, **self.masks)[0])
        return self.b(self.layer(*given, **self.masks))


def mask(*shape: int, kind: str) -> Tensor:
    """A random mask of which no row is masked completely."""
    hidden_places = torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.4
    hidden_places[..., 0] = False
    if kind == "bool":
        return hidden_places
    return torch.zeros(*shape).masked_fill(hidden_places, -torch.inf)


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, **options)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 12, **options)


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 12, **options)


def transformer(**options: Any) -> nn.Transformer:
    return nn.Transformer(WIDTH, HEADS, 2, 2, 12, **options)


BATCH, CAUSAL = {"batch_first": True}, nn.Transformer.generate_square_subsequent_mask(SHORT)
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "self": (lambda: Calling(attention(**BATCH)), (LONG,)),
    "self, tokens first": (lambda: Calling(attention()), (LONG,)),
    "self without biases": (lambda: Calling(attention(bias=False, **BATCH)), (LONG,)),
    "self, a mask": (lambda: Calling(attention(**BATCH), attn_mask=mask(LONG, LONG, kind="bool")), (LONG,)),
    "self, a mask to add": (lambda: Calling(attention(), attn_mask=mask(LONG, LONG, kind="float")), (LONG,)),
    "self, a mask a head": (
        lambda: Calling(attention(**BATCH), attn_mask=mask(3 * HEADS, LONG, LONG, kind="bool")),
        (LONG,),
    ),
    "self, padding": (lambda: Calling(attention(**BATCH), key_padding_mask=mask(3, LONG, kind="bool")), (LONG,)),
    "self, both masks": (
        lambda: Calling(attention(**BATCH), attn_mask=mask(LONG, LONG, kind="float"),
                        key_padding_mask=mask(3, LONG, kind="float")),
        (LONG,),
    ),
    "across": (lambda: Calling(attention(**BATCH)), (SHORT, LONG)),
    "across, other widths": (lambda: Calling(attention(kdim=WIDTH, vdim=WIDTH, bias=False)), (SHORT, LONG)),
    "across, a mask": (lambda: Calling(attention(), attn_mask=mask(SHORT, LONG, kind="bool")), (SHORT, LONG)),
    "encoder layer": (lambda: Calling(encoder_layer(**BATCH)), (LONG,)),
    "encoder layer, norms first": (lambda: Calling(encoder_layer(norm_first=True, activation="gelu")), (LONG,)),
    "encoder": (lambda: Calling(nn.TransformerEncoder(encoder_layer(**BATCH), 2)), (LONG,)),
    "encoder with a norm and a mask": (
        lambda: Calling(
            nn.TransformerEncoder(encoder_layer(**BATCH), 2, nn.LayerNorm(WIDTH)), mask=CAUSAL, is_causal=True
        ),
        (SHORT,),
    ),
    "decoder layer": (lambda: Calling(decoder_layer(**BATCH), tgt_mask=CAUSAL), (SHORT, LONG)),
    "decoder layer, norms first": (lambda: Calling(decoder_layer(norm_first=True)), (SHORT, LONG)),
    "decoder": (
        lambda: Calling(
            nn.TransformerDecoder(decoder_layer(**BATCH), 2), memory_key_padding_mask=mask(3, LONG, kind="bool")
        ),
        (SHORT, LONG),
    ),
    "transformer": (lambda: Calling(transformer(**BATCH), tgt_mask=CAUSAL), (LONG, SHORT)),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, lengths = CASES[name]
    model = make()
    layer = model.layer
    first = getattr(layer, "batch_first", None)
    inner = next((m.batch_first for m in layer.modules() if isinstance(m, nn.MultiheadAttention)), False)
    first = inner if first is None else first
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return model.eval(), tuple(torch.randn(3, n, 5) if first else torch.randn(n, 3, 5) for n in lengths)


@pytest.mark.parametrize("name", CASES)
def test_expansion_equals_the_layer(name: str) -> None:
    model, xs = made(name)
    with reproducible():
        traced = symbolic(model, xs, {})
    assert without_rule(traced) == 0
    assert difference(outputs(model, xs), outputs(traced, xs)) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_its_channels_are_found(name: str) -> None:
    model, xs = made(name)
    result = plain_merge(model, xs, ratio=0.5)
    found = result.analysis
    assert found.captured.route == "symbolic"
    assert max(fxmerge.verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    inside = {m.layer.module for g in found.groups for m in (*g.producers, *g.consumers)}
    assert {"a", "b"} <= inside and len(found.groups) >= 2
    assert result.report.after.parameters < 0.55 * result.report.before.parameters


@pytest.mark.slow
def test_masks_that_are_given_are_no_constants() -> None:
    """The merged model respects a padding mask from the caller that differs from the example's."""
    torch.manual_seed(0)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
            self.layers = nn.TransformerEncoder(encoder_layer(batch_first=True), 2)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            y = self.layers(self.a(x), src_key_padding_mask=padding)
            out: Tensor = self.b(y.masked_fill(padding[..., None], 0).sum(1))
            return out

    model, x = Padded().eval(), torch.randn(3, LONG, 5)
    one, other = mask(3, LONG, kind="bool"), mask(3, LONG, kind="bool").flip(0)
    result = plain_merge(model, (x, one), ratio=0.0)
    for padding in (one, other):
        assert difference(outputs(model, (x, padding)), outputs(result.module, (x, padding))) < 1e-5
    result = plain_merge(model, (x, one), ratio=0.5)
    assert result.report.after.parameters < 0.4 * result.report.before.parameters
