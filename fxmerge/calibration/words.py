"""The vocabularies of a model: which inputs are ids of words, and which outputs have an entry for each word."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor, fx

from fxmerge.ir.provenance import Provenance
from fxmerge.weights.by_path import at


def vocabularies(module: fx.GraphModule, facts: Provenance) -> dict[int, Tensor]:
    """Placeholder number -> the smallest embedding that it indexes, (vocabulary, features), if it holds token ids."""
    placeholders = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    found: dict[int, Tensor] = {}
    for layer in facts.layers:
        if layer.op != "embedding":
            continue
        node = next((n for n in module.graph.nodes if n.name == layer.node), None)
        table = at(module, layer.params["weight"])
        sources = [s.name for s in node.all_input_nodes] if node is not None else []
        while sources:
            source = sources.pop()
            if source in placeholders:
                number = placeholders.index(source)
                found[number] = min(table, found.get(number, table), key=len)
            elif facts.kinds.get(source) in ("movement", "query", "per_channel"):
                sources += facts.sources.get(source, ())
    return found


def word_counts(module: fx.GraphModule, facts: Provenance) -> frozenset[int]:
    """The sizes of the vocabularies that the model reads.

    An output with as many entries along its last axis scores words: a softmax makes a distribution of it, which no
    constant added to all scores changes.
    """
    return frozenset(len(table) for table in vocabularies(module, facts).values())


def scores_words(y: Tensor, counts: Container[int]) -> bool:
    """Whether an output scores the words of a vocabulary. counts: `word_counts` of the model"""
    return y.dim() > 1 and y.size(-1) in counts and y.is_floating_point()
