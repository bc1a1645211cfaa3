"""Copies of channels: whether ops that move values treat those of one channel as those of another.

A channel may be at several places of a tensor: after a flatten at all pixels, after `torch.cat([x, x])` twice. Two
channels can be merged into each other only if copy q of one corresponds to copy q of the other everywhere. A slice that
takes the first copy of one channel and the second of another, or a roll that reverses the order of the copies of one
of them, breaks this, although both channels may be dropped. Each op that moves values is run on numbers of copies,
which shows where each copy comes from.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.graph import nested
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Ints
from fxmerge.ir.labels import thin, varying
from fxmerge.ir.provenance import Lab, Param, Provenance

Moved = tuple[Ints, Ints]


def copy_numbers(atoms: Ints) -> Ints:
    """Which copy of its atom is at each place, (m,): 0, 1, ..."""
    order = np.argsort(atoms, kind="stable")
    _, first, at = np.unique(atoms[order], return_index=True, return_inverse=True)
    number = np.empty_like(atoms)
    number[order] = np.arange(len(atoms)) - first[at.reshape(-1)]
    return number


def alike(rows: Ints, cell: Ints) -> bool:
    """Are the rows of all channels of a cell the same? rows: (m, copies), cell: (m,)"""
    _, first, of_cell = np.unique(cell, return_index=True, return_inverse=True)
    return bool((rows == rows[first[of_cell.reshape(-1)]]).all())


class Copies:
    """Where the copies of channels come from, at each node that moves values."""

    def __init__(self, captured: Capture, facts: Provenance, atom: Ints) -> None:
        self.facts, self.atom, self.interpreter = facts, atom, fx.Interpreter(captured.module)
        self.nodes = {node.name: node for node in captured.module.graph.nodes}
        self.known: dict[str, Moved | None] = {}

    def cross(self, names: Collection[str], lookup: Ints, cell: Ints) -> bool:
        """Does a node treat channels of one cell differently? lookup: atom -> its number in the group, or -1."""
        for name in names:
            moved = self.moved(name) if self.facts.kinds.get(name) == "movement" else None
            if moved is None:
                continue
            held, code = moved
            at = lookup[held]
            code, at = code[at >= 0], at[at >= 0]
            order = np.argsort(at, kind="stable")
            channels, count = np.unique(at, return_counts=True)
            for c in np.unique(count).tolist():
                here = np.isin(at[order], channels[count == c])
                rows = code[order][here].reshape(-1, c)
                if not alike(rows, cell[channels[count == c]]):
                    return True
        return False

    def moved(self, name: str) -> Moved | None:
        """(the atom at each place of a node's output, the copy that is there), both (m,); None if there are no copies.

        Axes that labels do not vary along are left out. Also None where the op cannot be run on numbers.
        """
        if name not in self.known:
            self.known[name] = self._moved(self.nodes[name])
        return self.known[name]

    def _moved(self, node: fx.Node) -> Moved | None:
        labels = self.facts.labels.get(node.name)
        operands = [self.facts.labels[n.name] for n in node.all_input_nodes if n.name in self.facts.labels]
        if labels is None or not any(self._repeated(t) for t in (labels, *operands)):
            return None
        try:
            found = self._run(node, [1])
        except Exception:
            return None  # an op that takes no numbers
        if not isinstance(found, Tensor) or found.shape != labels.shape:
            return None
        for axis in set(range(labels.dim())) - set(varying(labels)):
            found = found.narrow(axis, 0, 1) if found.size(axis) else found
        if bool((found != found.round()).any()):
            return None
        return self.atom[thin(labels).numpy()].reshape(-1), found.long().reshape(-1).numpy()

    def _repeated(self, labels: Tensor) -> bool:
        inside = self.atom[thin(labels).numpy()].reshape(-1)
        inside = inside[inside != self.atom[0]]
        return len(np.unique(inside)) < len(inside)

    def _run(self, node: fx.Node, start: list[int]) -> Any:
        """The node's value, where the activations that it takes hold numbers of copies, from start[0] on."""

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            labels, known = self.facts.labels.get(leaf.name), self.facts.values.get(leaf.name)
            if labels is None:
                if any(isinstance(v, Lab) for v in nested.leaves(known)):
                    return self._run(leaf, start)  # several tensors, such as those of chunk
                return known.value if isinstance(known, Param) else known
            found = start[0] + self._numbers(labels)
            start[0] += labels.numel()
            return found

        args, kwargs = nested.tree(value, tuple(node.args)), nested.tree(value, dict(node.kwargs))
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def _numbers(self, labels: Tensor) -> Tensor:
        """A number for each place of an activation, the same for copy q of each channel, in float64."""
        small = thin(labels)
        copy = copy_numbers(self.atom[small.numpy()].reshape(-1))
        number = torch.from_numpy(copy).double().view(small.shape)
        for axis in range(labels.dim()):
            if small.size(axis) < labels.size(axis):
                shape = [-1 if other == axis else 1 for other in range(labels.dim())]
                number = number * labels.size(axis) + torch.arange(labels.size(axis), dtype=torch.float64).view(shape)
        return number.expand(labels.shape)
