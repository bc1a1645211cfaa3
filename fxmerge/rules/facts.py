"""FactsBuilder: the facts that rules record while a graph is interpreted on labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.errors import source_line
from fxmerge.ir.labels import numbers, varying
from fxmerge.ir.provenance import Block, Bond, Contraction, Grid, Lab, Layer, Param, Pin, Stack, Tie


class FactsBuilder:
    """The facts found so far. They are only ever added, so that those of one call can be taken back.

    whole: may whole blocks of channels leave (heads of attention, groups of a convolution)?
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.node_of: dict[int, fx.Node] = {}  # identity of a value -> the first node that gave it
        self.wanted: dict[str, set[int]] = {}  # node that makes a constant -> its axes that channels meet
        self.label_count = 1  # label 0 is FIXED
        self.ties: list[Tie] = []
        self.pins: list[Pin] = []
        self.blocks: list[Block] = []
        self.grids: list[Grid] = []
        self.bonds: list[Bond] = []
        self.stacks: list[Stack] = []
        self.contractions: list[Contraction] = []
        self.mixers: list[tuple[str, Tensor]] = []
        self.layers: list[Layer] = []
        self.block_numbers: list[Tensor] = []  # labels that number blocks, and are not channels
        self.axes: dict[tuple[str, int], Tensor] = {}  # (parameter, axis) -> the labels along it
        self.elements: dict[str, Tensor] = {}  # raw parameter -> a label for each element
        self.groups: dict[str, int] = {}  # parameter of a grouped convolution -> groups
        self.frozen: dict[str, tuple[str, fx.Node]] = {}  # parameter -> (why it keeps its shape, the node)
        self._collections: tuple[list[Any] | dict[Any, Any], ...] = (
            self.ties, self.pins, self.blocks, self.grids, self.bonds, self.contractions, self.mixers, self.layers,
            self.block_numbers, self.axes, self.elements, self.groups, self.frozen, self.stacks,
        )  # fmt: skip

    def sizes(self) -> tuple[int, ...]:
        """How many facts of each sort there are, for `take_back`."""
        return tuple(map(len, self._collections))

    def take_back(self, sizes: Sequence[int]) -> None:
        """Remove every fact that was added since `sizes()`. Labels are numbered on: no number is used twice."""
        for held, size in zip(self._collections, sizes, strict=True):
            if isinstance(held, list):
                del held[size:]
            else:
                while len(held) > size:
                    held.popitem()

    def fresh(self, count: int) -> Tensor:
        """New labels, (count,)."""
        self.label_count += count
        return torch.arange(self.label_count - count, self.label_count)

    def labelled_elements(self, param: Param) -> Tensor:
        """A label for each element of a raw parameter, made at its first use; shaped like the parameter."""
        known = self.elements.get(param.path)
        if known is None:
            known = self.elements[param.path] = self.fresh(param.value.numel()).view(param.value.shape)
        return known

    def want(self, constant: object, labels: Tensor) -> None:
        """Note the axes of a constant, whose value some node gave, along which it meets labels that vary."""
        node, value = self.node_of.get(id(constant)), constant.t if isinstance(constant, Lab) else constant
        if node is not None and isinstance(value, Tensor):
            offset = value.dim() - labels.dim()
            axes = {a + offset for a in varying(labels) if a + offset >= 0 and value.size(a + offset) > 1}
            self.wanted.setdefault(node.name, set()).update(axes)

    def pin(self, node: fx.Node, labels: Tensor, reason: str) -> None:
        self.pins += pins_of(node, labels, reason)

    def freeze(self, node: fx.Node, param: Param, reason: str) -> None:
        """The parameter may not change its shape; the first reason is kept."""
        self.frozen.setdefault(param.path, (f"{param.path} {reason}", node))

    def tie_unused_rows(self) -> None:
        """Rows of a table that nothing uses are tied to a row that is used, so that what is left is a rectangle."""
        met = torch.zeros(self.label_count, dtype=torch.bool)
        for tie in self.ties:
            met[tie.left], met[tie.right] = True, True
        for pin in self.pins:
            met[pin.labels] = True
        stacked = {stack.path for stack in self.stacks}  # see `analysis.stacks`
        for elements in (own for path, own in self.elements.items() if path not in stacked):
            for axis in range(elements.dim() if elements.dim() > 1 else 0):
                along = elements.movedim(axis, 0).flatten(1)
                taken = met[along].any(1)
                if bool(taken.any()) and not bool(taken.all()):
                    first, others = along[taken][:1], along[~taken]
                    self.ties.append(Tie("", first.expand_as(others).flatten(), others.flatten()))


def pins_of(node: fx.Node, labels: Tensor, reason: str) -> list[Pin]:
    """The pin of the channels among some labels; none where there are no channels."""
    found = numbers(labels)
    return [Pin(found, reason, node.name, source_line(node))] if found.numel() else []
