"""Members: which layers hold a group's channels, at which places, and the nodes between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fxmerge.analysis.copies import Copies, alike
from fxmerge.analysis.linear_paths import mixable, strands
from fxmerge.analysis.meetings import meetings
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Factors, Group, Ints, Member, Path, Strands
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.weights.by_path import at as tensor_at

ROW_BYTES = 16  # torch.nn.functional.grouped_mm takes matrices whose rows are a multiple of this


class Builder:
    """Builds each group with its members, from the layers that hold its labels."""

    def __init__(
        self, captured: Capture, facts: Provenance, atom: Ints, of_group: Ints, present: dict[str, Ints]
    ) -> None:
        self.captured, self.facts, self.atom, self.of_group = captured, facts, atom, of_group
        self.module = captured.module
        self.copies = Copies(captured, facts, atom)
        self.order = {name: number for number, name in enumerate(facts.kinds)}
        self.lookup = np.full(len(of_group), -1, dtype=np.int64)  # atom -> its index in the group that is being built
        self.nodes: dict[int, set[str]] = defaultdict(set)  # group -> nodes that hold its labels
        for name, inside in present.items():
            for number in np.unique(of_group[inside]).tolist():
                self.nodes[number].add(name)
        self.holders: dict[int, list[tuple[Layer, str, Ints]]] = defaultdict(list)
        self.written_at: dict[tuple[int, str], bool] = {}
        for layer in facts.layers:
            for role, labels in (("write", layer.writes), ("carry", layer.carries), ("read", layer.reads)):
                if labels is None:
                    continue
                inside = atom[labels.numpy()]
                for number in np.unique(of_group[inside]).tolist():
                    if number >= 0:
                        self.holders[number].append((layer, role, inside.reshape(-1)))
                        if role == "write":
                            self.written_at[number, layer.node] = True

    def build(self, number: int, inside: Ints, cell: Ints) -> Group:
        lookup = self.lookup
        lookup[inside] = np.arange(len(inside))
        members: dict[str, list[Member]] = {"write": [], "carry": [], "read": []}
        partners = True
        for layer, role, held in self.holders[number]:
            at = lookup[held]
            places = np.flatnonzero(at >= 0)
            places = places[np.argsort(at[places], kind="stable")]
            copies = np.bincount(at[places], minlength=len(inside))
            for count in np.unique(copies[copies > 0]).tolist():  # one member for each number of copies
                stands = np.flatnonzero(copies == count)
                here = places if len(stands) * count == len(places) else places[np.isin(at[places], stands)]
                where = here.reshape(len(stands), count)
                partners &= _aligned(where, cell[stands])
                members[role].append(Member(layer, role, torch.from_numpy(stands), torch.from_numpy(where)))  # type: ignore[arg-type]
        # a weight that writes and reads along one axis (an embedding that is also the head) cannot absorb anything
        partners &= not {_side(m) for m in members["write"]} & {_side(m) for m in members["read"]}
        partners &= self.facts.whole is None or not self._holds(number, self.facts.whole)  # a block absorbs no other
        partners &= all(m.layer.op != "table" for m in members["carry"])  # nor does a row of a table
        partners = partners and not self.copies.cross(self.nodes[number], lookup, cell)
        first = members["write"][0].layer.module if members["write"] else ""
        producers, consumers, junctions, rigid = self._paths(number, members["write"], members["read"])
        nodes = self.nodes[number]
        ordered = sorted((n for n in nodes if n in self.order), key=self.order.__getitem__)
        mixed = [n for n, labels in self.facts.mixers if self._holds(number, labels)]
        blocked = [
            n
            for n in ordered
            if self.facts.kinds[n] in ("per_channel", "tie", "mixer", "per_channel_param")
            and not self.facts.commutes.get(n, False)
        ]
        blocked += [n for n in ordered if self.facts.made.get(n, False)]
        blocked += [m.layer.node for m in members["carry"] if m.layer.op == "joined"]  # a class token has a fixed scale
        blocked += [m.layer.node for m in members["write"] if m.layer.operation.is_recurrent]
        blocks = self._blocks(number, lookup, cell)
        lookup[inside] = -1
        met = meetings(self.facts, ordered, producers)
        path = Path(frozenset(nodes), tuple(producers), tuple(members["carry"]), tuple(consumers), met, tuple(mixed))
        why, factors = "its channels cannot be mixed", Factors()
        if partners:
            why, factors = mixable(self.captured, self.facts, path, self.atom, inside, int(cell.max()) + 1)
        single = len(producers) == 1 and len(consumers) == 1 and not junctions and not mixed
        return Group(
            name=first,
            atoms=torch.from_numpy(inside),
            cells=torch.from_numpy(cell),
            producers=tuple(producers),
            per_channel_params=tuple(members["carry"]),
            consumers=tuple(consumers),
            mixers=tuple(dict.fromkeys(mixed)),
            ties=tuple(junctions),
            internal=single,
            scale_blocks=tuple(dict.fromkeys([*blocked, *rigid])),
            blocks=blocks,
            partners=partners,
            meetings=met,
            multiple=max((self._multiple(m.layer) for m in (*producers, *consumers)), default=1),
            nonlinear=why,
            strands=strands(self.facts, path, self.atom, inside) if not why else Strands(),
            factors=factors,
        )

    def _multiple(self, layer: Layer) -> int:
        """The number of channels of which a layer takes multiples only."""
        if self.facts.rules.get(layer.node) != "grouped_mm":
            return 1
        return max(1, ROW_BYTES // tensor_at(self.module, layer.params["weight"]).element_size())

    def _blocks(self, number: int, lookup: Ints, cell: Ints) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The group's blocks: for each row of labels its cells, each as often as one of its channels is in the row.

        A cell is in one row of each block.
        """

        def cells(row: Ints) -> tuple[int, ...]:
            channels, times = np.unique(row, return_counts=True)
            one = dict(zip(cell[channels].tolist(), times.tolist(), strict=True))
            return tuple(c for c in sorted(one) for _ in range(one[c]))

        found = []
        for block in self.facts.blocks:
            inside = self.atom[block.labels.numpy()]
            if (self.of_group[inside] == number).all():
                found.append(tuple(cells(row) for row in lookup[inside]))
        return tuple(dict.fromkeys(found))

    def _holds(self, number: int, labels: Tensor) -> bool:
        return bool((self.of_group[self.atom[labels.numpy()]] == number).any())

    def _back(self, number: int, node: str) -> tuple[str, list[str]]:
        """(the node where the group's common coordinates begin, the nodes from there to a given node)."""
        steps: list[str] = []
        while (number, node) not in self.written_at:
            sources = [s for s in dict.fromkeys(self.facts.sources[node]) if s in self.nodes[number]]
            if len(sources) != 1:
                break
            if self.facts.kinds[node] not in ("movement", "query"):
                steps.append(node)
            node = sources[0]
        return node, steps[::-1]

    def _paths(
        self, number: int, producers: list[Member], consumers: list[Member]
    ) -> tuple[list[Member], list[Member], list[str], list[str]]:
        """(producers and consumers with their steps, nodes where outputs of producers join, layers between those)."""
        ends: list[tuple[Member, str, list[str]]] = []  # (consumer, the node where its walk ended, steps from there)
        for consumer in consumers:
            if consumer.layer.inner:
                ends.append((consumer, consumer.layer.node, []))
                continue
            for source in dict.fromkeys(self.facts.sources[consumer.layer.node]):
                if source in self.nodes[number]:
                    ends.append((consumer, *self._back(number, source)))
                    break
        junctions = {
            n for n in self.nodes[number]
            if (number, n) not in self.written_at
            and len([s for s in dict.fromkeys(self.facts.sources[n]) if s in self.nodes[number]]) > 1
        }  # fmt: skip
        if not junctions and len(set(self._calls([w.layer.node for w in producers]))) == 1:
            # all calls of one weight: what follows it on all ways, with the same parameters, leads to the coordinates
            count = _common_prefix([self._calls(steps) for _, _, steps in ends])
            ways = {origin: tuple(steps[:count]) for _, origin, steps in reversed(ends)}
            placed = [replace(r, steps=tuple(steps[count:])) for r, _, steps in ends]
            return [replace(w, steps=ways.get(w.layer.node, ())) for w in producers], placed, [], []
        onto: dict[str, list[str]] = {}
        carrying = {layer.node for layer in self.facts.layers if layer.carries is not None}
        rigid: list[str] = []
        for junction in (n for n in self.facts.kinds if n in junctions):
            for source in dict.fromkeys(self.facts.sources[junction]):
                if source in self.nodes[number]:
                    origin, steps = self._back(number, source)
                    if (number, origin) not in self.written_at:
                        rigid += [s for s in steps if s in carrying]
                    elif self._calls(onto.setdefault(origin, steps)) != self._calls(steps):
                        # one producer, joined with itself along two paths
                        rigid += [s for s in (*onto[origin], *steps) if s in carrying]
        placed_producers = [replace(w, steps=tuple(onto.get(w.layer.node, ()))) for w in producers]
        placed = []
        for consumer, origin, steps in ends:
            ahead = onto.get(origin, []) if (number, origin) in self.written_at else []
            if self._calls(steps[: len(ahead)]) != self._calls(ahead):  # it branches off before the common coordinates
                rigid += ahead
                steps, ahead = [], []
            placed.append(replace(consumer, steps=tuple(steps[len(ahead) :])))
        return placed_producers, placed, [n for n in self.facts.kinds if n in junctions], rigid

    def _calls(self, steps: Sequence[str]) -> list[str]:
        """Steps by what they call, so that two calls of one module are the same step."""
        return [self.facts.same_call[step] for step in steps]


def _side(member: Member) -> tuple[str, bool]:
    """(a layer's weight, does the member's role concern its first axis?)"""
    return member.layer.params.get("weight", ""), (member.role == "write") != member.layer.transposed


def _common_prefix(paths: Sequence[Sequence[str]]) -> int:
    """The number of steps that all paths begin with."""
    count = 0
    for step in zip(*paths, strict=False):
        if len(set(step)) > 1:
            break
        count += 1
    return count


def _aligned(where: Ints, cell: Ints) -> bool:
    """Are the copies of all channels of a cell at the same distances, so that copy q of each matches?"""
    return where.shape[1] == 1 or alike(where - where[:, :1], cell)
