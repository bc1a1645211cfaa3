"""Stacked experts: whether each of them may lose channels of its own choice, or all lose the same ones.

On activations a channel of a stack has one label, whichever expert computed the place. The rest is decided here:

- Where all that happens between the layers of a stack is computed row by row, and the layers agree on the expert of
  each row, the hidden channels of one expert have nothing to do with those of another. Each expert gets labels of its
  own, with the ties that the labels of the activations have; those of the first expert are the activations' labels. All
  experts must lose equally many, so that the stack stays a rectangle: they are the rows of a block.
- Elsewhere, as in a residual stream, all experts lose the same channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.analysis.whole_blocks import Bools, atoms
from fxmerge.errors import source_line
from fxmerge.graph.nested import leaves, tree
from fxmerge.ir.capture import Capture
from fxmerge.ir.labels import thin, varying
from fxmerge.ir.provenance import Block, Lab, Layer, Provenance, Stack, Tie
from fxmerge.rules import movement, unary
from fxmerge.rules.lookup import name_of, rule_of

# rules of ops that compute each entry from the entries at the same place of their operands
POINTWISE = {row.name for row in unary.ROWS} | {
    "identity", "relu", "leaky_relu", "dropout", "relu6", "hardtanh", "gelu", "silu", "mish", "elu", "celu", "selu",
    "logsigmoid", "hardsigmoid", "hardswish", "softplus", "softsign", "softshrink", "hardshrink", "tanhshrink",
    "threshold", "pow", "add", "sub", "mul", "div", "rsub", "maximum", "minimum", "where", "addcmul", "glu",
    "masked_fill", "zeros_like", "ones_like", "full_like", "query",
}  # fmt: skip


def apart(captured: Capture, facts: Provenance) -> Provenance:
    """The same facts, with labels for each expert where it may lose channels of its own choice."""
    if not facts.stacks:
        return facts
    free = _free(captured, facts)
    own = torch.from_numpy(free)
    place = torch.full((facts.label_count,), -1)
    place[own] = torch.arange(int(own.sum()))
    experts = max((s.experts for s in facts.stacks if bool(own[s.labels].any())), default=1)
    table = torch.arange(facts.label_count)[own].repeat(experts, 1)  # (experts, m), the labels of each expert
    made, count = torch.zeros(facts.label_count, dtype=torch.bool), facts.label_count
    ties, blocks = list(facts.ties), list(facts.blocks)
    for stack in facts.stacks:
        mine = own[stack.labels]
        if stack.rows is not None:
            first, others = stack.rows[:1, ~mine], stack.rows[1:, ~mine]
            ties.append(Tie(stack.node, first.expand_as(others).reshape(-1), others.reshape(-1)))
        labels = stack.labels[mine & ~made[stack.labels]]
        if not labels.numel():
            continue
        made[labels] = True
        fresh = torch.arange(count, count + (stack.experts - 1) * len(labels)).view(stack.experts - 1, -1)
        count += fresh.numel() if stack.rows is None else 0
        rows = fresh if stack.rows is None else stack.rows[1:, mine]
        table[1 : stack.experts, place[labels]] = rows
        every = table[: stack.experts, place[labels]]
        blocks.append(Block(every, stack.node, _where(captured, stack), leaves_whole=False))
    for tie in facts.ties:
        inside = own[tie.left]
        if bool(inside.any()):
            pair = [table[1:, place[side[inside]]].reshape(-1) for side in (tie.left, tie.right)]
            ties.append(Tie(tie.node, pair[0], pair[1]))
    if not bool(own.any()):
        return replace(facts, ties=tuple(ties))

    def spelled(labels: Tensor, number: int) -> Tensor:
        """The labels of each expert, (experts, n)."""
        rows = labels.repeat(number, 1)
        rows[:, own[labels]] = table[:number, place[labels[own[labels]]]]
        return rows

    stacked = {(s.path, s.axis): s.experts for s in facts.stacks if s.rows is None and bool(own[s.labels].any())}
    params = dict(facts.params)
    for path, axis in stacked:
        held = params[path]
        params[path] = replace(held, axes={**held.axes, axis: spelled(held.axes[axis], stacked[path, axis])})
    layers = tuple(_layer(layer, stacked, spelled) for layer in facts.layers)
    found = replace(facts, ties=tuple(ties), blocks=tuple(blocks), params=params, layers=layers, label_count=count)
    return found


def _layer(layer: Layer, stacked: Mapping[tuple[str, int], int], spelled: Callable[[Tensor, int], Tensor]) -> Layer:
    """A layer whose channels have labels for each expert, one expert after another."""
    if not layer.is_stacked:
        return layer
    path, out = layer.params["weight"], 2 if layer.transposed else 1
    writes, reads = layer.writes, layer.reads
    assert writes is not None and reads is not None
    writing, reading = stacked.get((path, out), 0), stacked.get((path, 3 - out), 0)
    return replace(
        layer,
        writes=spelled(writes, writing).flatten() if writing else writes,
        reads=spelled(reads.flatten(), reading).reshape(1, -1) if reading else reads,
        writes_apart=bool(writing),
        reads_apart=bool(reading),
    )


def _where(captured: Capture, stack: Stack) -> str:
    return next((source_line(n) for n in captured.module.graph.nodes if n.name == stack.node), "")


def _free(captured: Capture, facts: Provenance) -> Bools:
    """The labels of which each expert may have its own, (label_count,) bool."""
    atom = atoms(facts)
    size = int(atom.max()) + 1
    stacked = np.zeros(len(atom), dtype=bool)
    kind = np.full(size, -1, dtype=np.int64)  # the routing of each atom; -2 where there are several
    kinds: dict[tuple[str, int], int] = {}
    for stack in facts.stacks:
        inside = atom[stack.labels.numpy()]
        stacked[(stack.labels if stack.rows is None else stack.rows).numpy()] = True
        number = kinds.setdefault((stack.key, stack.experts), len(kinds)) if stack.key else -2
        kind[inside] = np.where((kind[inside] == -1) | (kind[inside] == number), number, -2)
    able = kind >= 0
    able[atom[~stacked]] = False
    for labels in _bound(facts):
        able[atom[labels.numpy().reshape(-1)]] = False
    held = {name: atom[thin(t).numpy()] for name, t in facts.labels.items() if name not in facts.views}
    for name, value in facts.values.items():
        inside = [atom[thin(v.t).numpy()].reshape(-1) for v in leaves(value) if isinstance(v, Lab)]
        if inside:
            held[name] = np.concatenate(inside)
    for node in captured.module.graph.nodes:
        names = (node.name, *(n.name for n in node.all_input_nodes))
        touched = [held[name].reshape(-1) for name in names if name in held]
        inside = np.unique(np.concatenate(touched)) if touched else atom[:0]
        if able[inside].any() and not _by_row(captured, facts, node):
            able[inside] = False
    found: Bools = able[atom]
    found[0] = False
    return found


def _bound(facts: Provenance) -> Iterator[Tensor]:
    """The labels of facts that are not kept for each expert."""
    yield from (pin.labels for pin in facts.pins)
    yield from (block.labels for block in facts.blocks)
    yield from (grid.labels for grid in facts.grids)
    yield from (bond.rows for bond in facts.bonds)
    yield from (t for c in facts.contractions for t in (thin(c.left), thin(c.right)))


def _by_row(captured: Capture, facts: Provenance, node: fx.Node) -> bool:
    """Is each row of a node's value computed from the same row of its operands?"""
    if any(layer.node == node.name and layer.is_stacked for layer in facts.layers):
        return True
    rule = name_of(rule_of(node, captured.module))
    if facts.kinds[node.name] != "movement":
        return rule in POINTWISE
    source = next((facts.labels[n.name] for n in node.all_input_nodes if n.name in facts.labels), None)
    if source is None:
        return rule == "getitem"  # one of several tensors, whose rows were looked at where they were made
    if node.op == "call_module" or any(n.name not in facts.labels for n in node.all_input_nodes):
        return False

    def numbered(leaf: Any) -> Any:
        return _rows(facts.labels[leaf.name]) if isinstance(leaf, fx.Node) else leaf

    try:
        made = movement.run(node.target, tree(numbered, tuple(node.args)), tree(numbered, dict(node.kwargs)))
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    known = Lab(facts.labels[node.name]) if node.name in facts.labels else facts.values.get(node.name)
    wanted = [v.t for v in leaves(list(known) if isinstance(known, tuple) else known) if isinstance(v, Lab)]
    found = leaves(list(made) if isinstance(made, tuple) else made)
    return len(found) == len(wanted) and all(torch.equal(a, _rows(b)) for a, b in zip(found, wanted, strict=True))


def _rows(labels: Tensor) -> Tensor:
    """The number of the row of each place: of the axes that labels do not vary along."""
    sizes = [1 if axis in varying(labels) else labels.size(axis) for axis in range(labels.dim())]
    return torch.arange(prod(sizes)).view(sizes).expand(labels.shape)
