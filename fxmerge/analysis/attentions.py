"""The attentions of a graph: where queries meet keys, and what is made of their scores meets values.

They are found by what is computed: a contraction that sums over channels of both operands gives scores, and the first
contraction that these reach sums the values (scaled_dot_product_attention is both). The second operand of scores is
the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmerge.ir.capture import Capture
from fxmerge.ir.labels import FIXED, numbers, thin
from fxmerge.ir.provenance import Contraction, Provenance
from fxmerge.ir.scores import is_attention, next_contractions, operands, score_operands


@dataclass(frozen=True)
class Attention:
    """What an attention stores of each token in a key-value cache.

    node:   where the values are summed
    keys:   a label for each number of a token's key; a head that serves several queries counts once
    values: likewise for its value
    sizes:  bytes of a number of the keys, and of the values
    """

    node: str
    keys: Tensor
    values: Tensor
    sizes: tuple[int, int]

    def stored(self, alive: Tensor) -> int:
        """Bytes per token of the labels with `alive[label]` True."""
        return sum(int(alive[t].sum()) * size for t, size in zip((self.keys, self.values), self.sizes, strict=True))


@dataclass(frozen=True)
class _Use:
    """An operand of a contraction: its labels, the letters of the axes that a token has entries along, its node."""

    record: Contraction
    side: int
    letters: set[str]
    node: fx.Node

    @property
    def labels(self) -> Tensor:
        """The labels of one token."""
        whole = (self.record.left, self.record.right)[self.side]
        letters = self.record.letters[self.side]
        return thin(whole[tuple(slice(None) if c in self.letters else 0 for c in letters)])


def attentions(captured: Capture, facts: Provenance) -> tuple[Attention, ...]:
    """The attentions whose keys or values vary with the model's inputs.

    Keys and values of parameters alone are not stored for each token: they have no labels here. Nor have those that an
    earlier attention stores already.
    """
    graph, found = captured.module.graph, list[Attention]()
    varies, known = _varying_with_inputs(graph, facts), set[tuple[int, bytes]]()
    written = torch.zeros(facts.label_count, dtype=torch.bool)
    for layer in facts.layers:
        if layer.writes is not None:
            written[layer.writes] = True
    for uses in _uses(graph, facts):
        labels, sizes = list[Tensor](), list[int]()
        for role, use in enumerate(uses):
            own = _each_once(use, facts, written)
            key = role, own.numpy().tobytes()
            labels.append(own if use.node in varies and key not in known else own[:0])
            known.add(key)
            sizes.append(captured.dtypes.get(use.node.name, torch.float32).itemsize)
        if len(labels[0]) + len(labels[1]):
            found.append(Attention(uses[1].record.node, labels[0], labels[1], (sizes[0], sizes[1])))
    return tuple(found)


def _uses(graph: fx.Graph, facts: Provenance) -> Iterator[tuple[_Use, _Use]]:
    """The keys and values of each attention."""
    nodes, records = {n.name: n for n in graph.nodes}, dict[str, list[Contraction]]()
    for record in facts.contractions:
        records.setdefault(record.node, []).append(record)
    for scores in facts.contractions:
        pair = score_operands(scores, nodes[scores.node], facts)
        if pair is None:
            continue
        keys = _Use(scores, 1, set(scores.letters[0]) & set(scores.letters[1]), pair[1])
        start, own = nodes[scores.node], records[scores.node]
        if is_attention(start, facts):
            for values in own[1:2]:
                yield keys, _Use(values, 1, set(values.letters[1]) & set(values.out), operands(start, facts)[2])
            continue
        reached, passed = next_contractions(start, records)
        for node in reached:
            given, (values, *others) = operands(node, facts), records[node.name]
            sides = [side for side, one in enumerate(given) if one not in passed]
            if not others and len(given) == 2 and len(sides) == 1:
                (side,) = sides
                yield keys, _Use(values, side, set(values.letters[side]) & set(values.out), given[side])
                break


def _each_once(use: _Use, facts: Provenance, written: Tensor) -> Tensor:
    """The labels of an operand, each once; places without a label as often as there are.

    Where channels met a table (the cosines of a rotation), these may be the labels of the table, the same for all
    heads. Then the labels are those of the nearest node before it that has labels of layers' outputs.
    """
    labels = use.labels
    found = numbers(labels)
    if bool(written[found].all()):
        return torch.cat([found, labels[labels == FIXED]])
    seen, waiting = {use.node}, [use.node]
    while waiting:
        waiting = [n for one in waiting for n in one.all_input_nodes if n not in seen and n.name in facts.labels]
        own = [numbers(facts.labels[n.name]) for n in waiting]
        own = [one for one in own if len(one) and bool(written[one].all())]
        if own:
            return numbers(torch.cat(own))
        seen.update(waiting)
    return found


def _varying_with_inputs(graph: fx.Graph, facts: Provenance) -> set[fx.Node]:
    """The nodes whose values vary with the values of the model's inputs, not only with their sizes."""
    found = set[fx.Node]()
    for node in graph.nodes:
        inputs = node.op == "placeholder" or any(n in found for n in node.all_input_nodes)
        if inputs and node.name not in facts.values and facts.kinds.get(node.name) != "query":
            found.add(node)
    return found
