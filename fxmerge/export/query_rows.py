"""The rows of queries to scale where a class takes the scale of its attention from the width of the heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Layer, Provenance

Rows = Mapping[str, Sequence[tuple[int, int, float]]]  # parameter -> (first row, end of the rows, factor)


def without_scale(captured: Capture, merged: fx.GraphModule, facts: Provenance, alive: Tensor) -> Rows:
    """{parameter: [(first row, end, sqrt(d_new / d))]} of the rows that produce the queries of an attention.

    Only for an attention whose call had no `scale` and to which the rewrite added the original one.
    """
    new = {n.name: n for n in merged.graph.nodes}
    found: dict[str, list[tuple[int, int, float]]] = {}
    for node in captured.module.graph.nodes:
        scale = new[node.name].kwargs.get("scale") if node.name in new else None
        if not isinstance(scale, float) or "scale" in node.kwargs or not isinstance(node.args[0], fx.Node):
            continue
        labels = torch.unique(facts.labels[node.args[0].name])
        labels = labels[(labels > 0) & alive[labels]]
        heads = captured.shapes[node.args[0].name][-3] if len(captured.shapes[node.args[0].name]) > 2 else 1
        for layer, rows in _writers(facts, labels, alive):
            _scale(found, layer, rows, float((len(rows) // heads) ** 0.5 * scale))
    return found


def of_all_products(facts: Provenance, alive: Tensor) -> Rows:
    """As `without_scale`, for every sum of products over a width that two activations lose alike."""
    found: dict[str, list[tuple[int, int, float]]] = {}
    scaled = torch.zeros(facts.label_count, dtype=torch.bool)
    for one in facts.contractions:
        both = set(one.letters[0]) & set(one.letters[1])
        left, right = (
            _lost(labels, [axis for axis, letter in enumerate(letters) if letter in both], alive)
            for labels, letters in zip((one.left, one.right), one.letters, strict=True)
        )
        queries, keys = (torch.unique(labels[labels > 0]) for labels in (one.left, one.right))
        if left is None or right is None or bool(scaled[queries].any()) or bool(scaled[keys].any()):
            continue
        scaled[queries] = True
        for layer, rows in _writers(facts, queries[alive[queries]], alive):
            _scale(found, layer, rows, left)
    return found


def _lost(labels: Tensor, axes: Sequence[int], alive: Tensor) -> float | None:
    """sqrt(d_new / d) along the last of these axes that becomes narrower, everywhere alike; None if none does."""
    here = (labels == 0) | alive[labels]
    for axis in reversed(axes):
        kept = set(here.sum(axis).flatten().tolist())
        if len(kept) == 1 and (left := kept.pop()) < labels.size(axis):
            return math.sqrt(left / labels.size(axis))
    return None


def _writers(facts: Provenance, labels: Tensor, alive: Tensor) -> Iterator[tuple[Layer, Tensor]]:
    """(layer, the rows of its narrowed weight) for the layers that write these labels."""
    for layer in facts.layers:
        if layer.writes is not None and bool(torch.isin(layer.writes, labels).any()):
            yield layer, torch.isin(layer.writes[alive[layer.writes]], labels).nonzero().flatten()


def _scale(found: dict[str, list[tuple[int, int, float]]], layer: Layer, rows: Tensor, factor: float) -> None:
    for path in (layer.params.get("weight"), layer.params.get("bias")):
        if path is not None:
            found.setdefault(path, []).append((int(rows[0]), int(rows[-1]) + 1, factor))
