"""Places: channels laid out along several axes may not come to a place with another meaning.

An op that lays channels out along several axes, as `view(b, 4, 8)`, makes each of its rows lose equally many channels.
What is left of each row is packed along the last of these axes, so a channel may come to another place along it, but
not along the others. Ops that follow may need more (`Grid`):

- The scores of attention are computed head by head. If heads are the last axis (`view(b, 8, 4)`), a row holds one
  channel of each head, and packing would move a channel into another head. The channels that stay must then fill a
  rectangle: all heads lose the same channels. Their labels are tied across the heads, and each row is one channel,
  which leaves with its row. The rows no longer have to lose equally many.
- An op that mixes channels along the axis that numbers the rows, as a softmax over the heads, meets channels at one
  place of all rows. Each row must then lose the same places, and their labels are tied across the rows.
- If two operands meet that are packed along different axes, one of them is kept a rectangle in the same way.

Labels at places that cannot be tied stay, with the op as the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.analysis.whole_blocks import Ints, atoms
from fxmerge.ir.labels import FIXED, numbers, rows
from fxmerge.ir.provenance import Block, Grid, Pin, Provenance, Tie

Words = NDArray[np.uint64]
_HELD = "holds channels that may not change places, next to others that must leave with them"


def upright(facts: Provenance) -> Provenance:
    """The same facts, with the ties by which channels keep their places along the axes that matter (see above)."""
    stages = (
        [g for g in facts.grids if g.held and g.single],
        [g for g in facts.grids if g.held and not g.single],
        [g for g in facts.grids if not g.held],
    )
    for grids in stages:
        while grids:
            step = _Step(facts, grids)
            if not step.changed:
                break
            facts = step.facts
    return _all_places_stay(facts)


class _Step:
    """One pass over some grids, with the atoms of the facts so far."""

    def __init__(self, facts: Provenance, grids: Sequence[Grid], moving: bool = True) -> None:
        self.atom = atoms(facts)
        self.size = int(self.atom.max()) + 1
        self.blocks = [b for b in facts.blocks if b.outer or not moving]
        self.inside = [self.atom[b.labels.numpy()] for b in self.blocks]
        self.random = np.random.default_rng(0)
        self.ties: list[Tie] = []
        self.pins: list[Pin] = []
        self.gone: dict[int, Block | None] = {}  # identity of a block -> the block that replaces it
        self.free = [np.zeros(len(i), dtype=bool) for i in self.inside]  # rows of a block that may leave as a whole
        self.index()
        for grid in grids:
            if grid.held:
                self.hold(grid)
            else:
                self.agree(grid)
        for n, free in enumerate(self.free):
            if free.all() and id(self.blocks[n]) not in self.gone:
                self.release(n)
        kept = [self.gone.get(id(b), b) for b in facts.blocks]
        self.changed = bool(self.ties or self.pins or self.gone)
        self.facts = replace(
            facts,
            ties=(*facts.ties, *self.ties),
            pins=(*facts.pins, *self.pins),
            blocks=tuple(b for b in kept if b is not None),
        )

    def index(self) -> None:
        """Sorts the atoms of all blocks, each with the number of its block, to look them up in `near`."""
        held = [np.zeros(0, dtype=np.int64), *(np.unique(i) for i in self.inside)]
        order = np.concatenate(held).argsort(kind="stable")
        self.sorted = np.concatenate(held)[order]
        self.owner = (np.repeat(np.arange(len(held)), [len(h) for h in held]) - 1)[order]

    def add(self, block: Block) -> None:
        """One more block to look up."""
        self.blocks.append(block)
        self.inside.append(self.atom[block.labels.numpy()])
        self.index()

    def near(self, labels: Tensor) -> list[int]:
        """The blocks that share atoms with some labels."""
        mine = np.unique(self.atom[labels[_runs(labels)].numpy()])
        first, last = np.searchsorted(self.sorted, mine), np.searchsorted(self.sorted, mine, side="right")
        touched = np.concatenate(
            [np.zeros(0, dtype=np.int64), *(np.arange(a, b) for a, b in zip(first, last, strict=True))]
        )
        return [n for n in np.unique(self.owner[touched]).tolist() if id(self.blocks[n]) not in self.gone]

    def marks(self, places: Tensor) -> tuple[Words, np.uint64]:
        """(a word for each atom that tells at which places it is, 0 for none; the word of all places)."""
        words = self.random.integers(1, 2**63, len(places), dtype=np.uint64)
        starts = _runs(places)  # equal rows in a row, as where the places are tokens, are one place
        together = np.add.reduceat(words, starts)
        held = self.atom[places[starts].numpy()]
        pairs = np.unique(np.repeat(np.arange(len(starts)), held.shape[1]) * self.size + held.reshape(-1))
        found = np.zeros(self.size, dtype=np.uint64)
        np.add.at(found, pairs % self.size, together[pairs // self.size])
        return found, words.sum(dtype=np.uint64)

    def crossing(self, found: Words, near: Sequence[int]) -> Iterator[int]:
        """The blocks that would move channels to other places as what is left of their rows is packed."""
        moving = [n for n in near if _moves(found[self.inside[n]]) and not _aligned(self.inside[n])]
        fine = [n for n in near if n not in moving]
        for n in moving:
            if not _solid(self.inside[n]) and not any(self.finer(self.inside[m], self.inside[n]) for m in fine):
                yield n

    def finer(self, small: Ints, large: Ints) -> bool:
        """Is each row of a block made of rows of another? Then it does not say where its channels are packed."""
        row = np.full(self.size, -1, dtype=np.int64)
        row[large.reshape(-1)] = np.repeat(np.arange(len(large)), large.shape[1])
        inside = row[small]
        touched = inside[(inside >= 0).any(1)]
        return bool((touched == touched[:, :1]).all()) and len(np.unique(small[inside >= 0])) == len(np.unique(large))

    def hold(self, grid: Grid) -> None:
        """Channels keep their places along the held axes of a grid."""
        places = rows(grid.labels, grid.held)
        near = self.near(places)
        found, everywhere = self.marks(places)
        crossing = list(self.crossing(found, near))
        if crossing and grid.single:
            self.tie_across(places, grid)
        elif crossing:
            for n in crossing:
                self.align(n)
        for n in near if grid.single else ():
            solid = (self.inside[n] == self.inside[n][:, :1]).all(1)
            self.free[n] |= solid & (found[self.inside[n][:, 0]] == everywhere)

    def equal(self, places: Tensor) -> bool:
        """Do places lose equally many, since they lose the same channels, or since each is made of rows of a block?"""
        held = self.atom[places.numpy()]
        if _aligned(held):
            return True
        sizes = [len(np.unique(row)) for row in held]
        found, _ = self.marks(places)
        mine = np.unique(held)
        near = [self.inside[n] for n in self.near(places)]
        whole = [i for i in near if not _moves(found[i]) and np.isin(mine, i).all()]
        return len(set(sizes)) == 1 and any((found[i] == found[i][:, :1]).all() for i in whole)

    def agree(self, grid: Grid) -> None:
        """What meets here is packed along one axis: the blocks that pack along another are kept rectangles."""
        near = self.near(grid.labels)
        along = {}
        for axis in range(grid.labels.dim()):
            found, _ = self.marks(rows(grid.labels, (axis,)))
            crossing = [n for n in self.crossing(found, near) if id(self.blocks[n]) not in self.gone]
            if crossing:
                along[axis] = crossing
        for crossing in list(along.values())[1:]:
            for n in crossing:
                self.align(n)

    def tie_across(self, places: Tensor, grid: Grid) -> None:
        """All places lose the same channels."""
        fixed = (places == FIXED).any(0)
        if bool(fixed.any()):
            self.pins.append(Pin(numbers(places[:, fixed]), _HELD, grid.node, grid.where))
        places = places[:, ~fixed]
        self.ties.append(Tie(grid.node, places[:1].expand_as(places).reshape(-1), places.reshape(-1)))

    def align(self, number: int) -> None:
        """All rows of a block lose the same channels."""
        block = self.blocks[number]
        first = block.labels[:1].expand_as(block.labels)
        self.ties.append(Tie(block.node, first.reshape(-1), block.labels.reshape(-1)))
        self.gone[id(block)] = None

    def release(self, number: int) -> None:
        """The rows of a block, of one channel each, may leave; they are the last axis of a block of larger rows."""
        block = self.blocks[number]
        outer = block.outer[:-1]
        larger = block.labels.reshape(int(np.prod(outer)), -1) if outer else None
        self.gone[id(block)] = None if larger is None else replace(block, labels=larger, outer=outer)


def _runs(labels: Tensor) -> Ints:
    """The first rows of the runs of equal rows."""
    changed = (labels[1:] != labels[:-1]).flatten(1).any(1)
    starts: Ints = np.flatnonzero(np.append(True, changed.numpy())[: len(labels)])
    return starts


def _moves(words: Words) -> bool:
    """Are there channels of different places in one row? words: (rows, size), 0 for channels that are elsewhere."""
    largest, smallest = words.max(1), np.where(words == 0, np.iinfo(np.uint64).max, words).min(1)
    return bool(((largest > 0) & (largest != smallest)).any())


def _aligned(inside: Ints) -> bool:
    return bool((inside == inside[:1]).all())


def _solid(inside: Ints) -> bool:
    return bool((inside == inside[:, :1]).all())


def _all_places_stay(facts: Provenance) -> Provenance:
    """Places that something else has one value for lose equally many, where the blocks do not say so already."""
    step = _Step(facts, (), moving=False)
    leaving = np.zeros(facts.label_count, dtype=bool)
    if facts.whole is not None:
        leaving[facts.whole.numpy()] = True
    more: list[Block] = []
    for grid in (g for g in facts.grids if g.held and g.single):
        places = rows(grid.labels, grid.held)
        if not leaving[places.numpy()].all() and not step.equal(places):
            more.append(Block(places, grid.node, grid.where))
            step.add(more[-1])
    return replace(facts, blocks=(*facts.blocks, *more))
