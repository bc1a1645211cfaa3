"""Groups: labels that must live or die together become atoms, atoms that are alike become merge groups.

1. Ties make labels equal: connected components are atoms. A pin in an atom pins all of it.
2. Two atoms are alike when they stand in the same nodes equally often: then every writer, carrier and reader of one is
   one of the other too, and one can be merged into the other. Alike atoms make a part.
3. Parts that share a block (rows that must lose equally many) are decided together: a networkx graph of parts and
   blocks, whose connected components are the groups. Within a group, channels merge within their cell (part and block
   rows) only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from .ir import Group, Grouping, Lab, Layer, Member, Pin, Provenance, Refusal
from .labels import thin
from .movement import leaves

Ints = NDArray[np.int64]


def atoms(facts: Provenance) -> Ints:
    """The atom of each label, (label_count,): connected components of the ties."""
    left = torch.cat([t.left for t in facts.ties]) if facts.ties else torch.zeros(0, dtype=torch.int64)
    right = torch.cat([t.right for t in facts.ties]) if facts.ties else left
    size = facts.label_count
    edges = coo_matrix((np.ones(len(left), dtype=np.int8), (left.numpy(), right.numpy())), shape=(size, size))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def group(facts: Provenance) -> Grouping:
    """Find the merge groups of a provenance. Deterministic: the same graph gives the same groups, in order."""
    atom = atoms(facts)
    pinned = _pinned(facts, atom)
    part, present = _parts(facts, atom, pinned)
    of_group, components = _components(facts, atom, part, pinned, _writer_order(facts, atom))
    builder = _Builder(facts, atom, of_group, present)
    named = _named([builder.build(number, *inside) for number, inside in components.items()])
    return Grouping(tuple(named), _refusals(facts, atom, pinned), torch.from_numpy(atom), _graph(named))


def _pinned(facts: Provenance, atom: Ints) -> dict[int, Pin]:
    """The first pin of each pinned atom; a block with a pinned atom is pinned whole."""
    pinned: dict[int, Pin] = {int(atom[0]): Pin(torch.zeros(0), "fixed", "", "")}
    for pin in facts.pins:
        for a in np.unique(atom[pin.labels.numpy()]):
            pinned.setdefault(int(a), pin)
    changed = True
    while changed:
        changed = False
        for block in facts.blocks:
            inside = np.unique(atom[block.labels.numpy()])
            first = next((pinned[a] for a in inside.tolist() if a in pinned), None)
            if first is not None and any(a not in pinned for a in inside.tolist()):
                changed = True
                for a in inside.tolist():
                    pinned.setdefault(a, replace(first, reason=f"shares a block at {block.node}: {first.reason}"))
    return pinned


def _parts(facts: Provenance, atom: Ints, pinned: dict[int, Pin]) -> tuple[Ints, dict[str, Ints]]:
    """A number for each atom, equal for atoms that stand in the same nodes equally often; and who stands where."""
    random = np.random.default_rng(0)  # a random 64-bit word a node; sums of words tell sets of nodes apart
    words = np.zeros(int(atom.max()) + 1, dtype=np.uint64)
    present: dict[str, Ints] = {}
    holders = [(name, thin(t)) for name, t in facts.labels.items()]
    holders += [(name, thin(v.t)) for name, value in facts.values.items() for v in leaves(value) if isinstance(v, Lab)]
    for layer in facts.layers:
        holders += [("", t) for t in (layer.writes, layer.carries) if t is not None]
    for name, labels in holders:
        inside, counts = np.unique(atom[labels.numpy()], return_counts=True)
        words[inside] += counts.astype(np.uint64) * random.integers(1, 2**63, dtype=np.uint64)
        if name:
            present[name] = np.union1d(present[name], inside) if name in present else inside
    return np.unique(words, return_inverse=True)[1].astype(np.int64), present


def _writer_order(facts: Provenance, atom: Ints) -> Ints:
    """Atoms in the order in which layers write them."""
    written = [atom[layer.writes.numpy()] for layer in facts.layers if layer.writes is not None]
    if not written:
        return np.zeros(0, dtype=np.int64)
    everything = np.concatenate(written)
    return everything[np.sort(np.unique(everything, return_index=True)[1])]


def _components(
    facts: Provenance, atom: Ints, part: Ints, pinned: dict[int, Pin], order: Ints
) -> tuple[Ints, dict[int, tuple[Ints, Ints]]]:
    """Join parts that share blocks: (the group of each atom or -1, group -> (its atoms in order, the cell of each))."""
    free = np.array([a for a in order.tolist() if a not in pinned], dtype=np.int64)
    graph: nx.Graph[tuple[str, int]] = nx.Graph()
    graph.add_nodes_from(("part", p) for p in dict.fromkeys(part[free].tolist()))
    rows = np.zeros(int(atom.max()) + 1, dtype=np.int64)  # a number for each combination of block rows
    for number, block in enumerate(facts.blocks):
        inside = atom[block.labels.numpy()]
        if any(a in pinned for a in np.unique(inside).tolist()):
            continue
        graph.add_edges_from((("part", p), ("block", number)) for p in np.unique(part[inside]).tolist())
        for at, row in enumerate(inside):
            rows[np.unique(row)] = rows[np.unique(row)] * (len(inside) + 1) + at + 1
        rows = np.unique(rows, return_inverse=True)[1].astype(np.int64)
    component_of = {
        node: number for number, component in enumerate(nx.connected_components(graph)) for node in component
    }
    by_group: dict[int, list[int]] = defaultdict(list)
    for a in free.tolist():
        by_group[component_of[("part", int(part[a]))]].append(a)
    of_group = np.full(int(atom.max()) + 1, -1, dtype=np.int64)
    cells: dict[int, tuple[Ints, Ints]] = {}
    for number, inside_list in enumerate(by_group.values()):
        inside = np.array(inside_list, dtype=np.int64)
        cell = np.unique(np.stack([part[inside], rows[inside]]), axis=1, return_inverse=True)[1].reshape(-1)
        of_group[inside] = number
        cells[number] = (inside, cell.astype(np.int64))
    return of_group, cells


class _Builder:
    """Fills in a group's members from the layers that hold its labels."""

    def __init__(self, facts: Provenance, atom: Ints, of_group: Ints, present: dict[str, Ints]) -> None:
        self.facts, self.atom, self.of_group = facts, atom, of_group
        self.nodes: dict[int, set[str]] = defaultdict(set)  # group -> nodes whose labels hold it
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
        lookup = np.full(len(self.of_group), -1, dtype=np.int64)
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
                where = places[np.isin(at[places], stands)].reshape(len(stands), count)
                partners &= _aligned(where, cell[stands])
                members[role].append(Member(layer, role, torch.from_numpy(stands), torch.from_numpy(where)))  # type: ignore[arg-type]
        first = members["write"][0].layer.module if members["write"] else ""
        writers, readers, junctions, rigid = self._paths(number, members["write"], members["read"])
        nodes = self.nodes[number]
        ordered = [n for n in self.facts.kinds if n in nodes]
        mixed = [n for n, labels in self.facts.mixers if n in nodes and self._holds(number, labels)]
        blocked = [
            n
            for n in ordered
            if self.facts.kinds[n] in ("per_channel", "tie", "mixer", "carrier")
            and not self.facts.commutes.get(n, False)
        ]
        single = len(writers) == 1 and len(readers) == 1 and not junctions and not mixed
        return Group(
            first, torch.from_numpy(inside), torch.from_numpy(cell), tuple(writers), tuple(members["carry"]),
            tuple(readers), tuple(dict.fromkeys(mixed)), tuple(junctions), single,
            tuple(dict.fromkeys([*blocked, *rigid])), self._blocks(number, lookup, cell), partners,
        )  # fmt: skip

    def _blocks(self, number: int, lookup: Ints, cell: Ints) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The group's blocks, each a row of cells for each row of labels; a cell stands in one row of each block."""
        found = []
        for block in self.facts.blocks:
            rows = lookup[self.atom[block.labels.numpy()]]
            if (self.of_group[self.atom[block.labels.numpy()]] == number).all():
                found.append(tuple(tuple(np.unique(cell[row]).tolist()) for row in rows))
        return tuple(dict.fromkeys(found))

    def _holds(self, number: int, labels: Tensor) -> bool:
        return bool((self.of_group[self.atom[labels.numpy()]] == number).any())

    def _back(self, number: int, node: str) -> tuple[str, list[str]]:
        """(where the group's common coordinates begin, what was passed since), walking up from a node."""
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
        self, number: int, writers: list[Member], readers: list[Member]
    ) -> tuple[list[Member], list[Member], list[str], list[str]]:
        """Members with their steps, the nodes where writers' outputs join, carriers that stand between such nodes."""
        ends: list[tuple[Member, str, list[str]]] = []  # (reader, the node its walk ended at, steps from there)
        for reader in readers:
            for source in dict.fromkeys(self.facts.sources[reader.layer.node]):
                if source in self.nodes[number]:
                    ends.append((reader, *self._back(number, source)))
                    break
        junctions = {
            n for n in self.nodes[number]
            if (number, n) not in self.written_at
            and len([s for s in dict.fromkeys(self.facts.sources[n]) if s in self.nodes[number]]) > 1
        }  # fmt: skip
        if not junctions and len(writers) == 1:
            shared = _common_prefix([steps for _, _, steps in ends])
            placed = [replace(r, steps=tuple(steps[len(shared) :])) for r, _, steps in ends]
            return [replace(writers[0], steps=tuple(shared))], placed, [], []
        onto: dict[str, list[str]] = {}
        rigid: list[str] = []
        for junction in (n for n in self.facts.kinds if n in junctions):
            for source in dict.fromkeys(self.facts.sources[junction]):
                if source in self.nodes[number]:
                    origin, steps = self._back(number, source)
                    if (number, origin) in self.written_at:
                        onto.setdefault(origin, steps)
                    else:
                        rigid += [s for s in steps if self.facts.kinds[s] == "carrier"]
        placed_writers = [replace(w, steps=tuple(onto.get(w.layer.node, ()))) for w in writers]
        placed = []
        for reader, origin, steps in ends:
            ahead = onto.get(origin, []) if (number, origin) in self.written_at else []
            if steps[: len(ahead)] != ahead:  # it branches off before the common coordinates begin
                rigid += ahead
                steps, ahead = [], []
            placed.append(replace(reader, steps=tuple(steps[len(ahead) :])))
        return placed_writers, placed, [n for n in self.facts.kinds if n in junctions], rigid


def _common_prefix(paths: list[list[str]]) -> list[str]:
    shared = []
    for step in zip(*paths, strict=False):
        if len(set(step)) > 1:
            break
        shared.append(step[0])
    return shared


def _aligned(where: Ints, cell: Ints) -> bool:
    """Do the copies of all channels of a cell stand at the same distances, so that copy q of one is copy q of all?"""
    if where.shape[1] == 1:
        return True
    distance = where - where[:, :1]
    _, first, of_cell = np.unique(cell, return_index=True, return_inverse=True)
    return bool((distance == distance[first[of_cell.reshape(-1)]]).all())


def _named(found: list[Group]) -> list[Group]:
    """Names are unique: the second group that a layer writes is `layer#2`."""
    seen: dict[str, int] = defaultdict(int)
    named = []
    for g in found:
        seen[g.name] += 1
        named.append(replace(g, name=g.name if seen[g.name] == 1 else f"{g.name}#{seen[g.name]}"))
    return named


def _refusals(facts: Provenance, atom: Ints, pinned: dict[int, Pin]) -> tuple[Refusal, ...]:
    """One refusal for each writer and reason."""
    found: dict[tuple[str, str, str], int] = defaultdict(int)
    for layer in facts.layers:
        if layer.writes is not None:
            for a in np.unique(atom[layer.writes.numpy()]).tolist():
                if a in pinned:
                    found[layer.module, pinned[a].reason, pinned[a].where] += 1
    return tuple(Refusal(name, channels, reason, where) for (name, reason, where), channels in found.items())


def _graph(groups: list[Group]) -> nx.DiGraph[str]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for g in groups:
        graph.add_node(g.name, kind="group", channels=g.channels)
        for role, members in (("write", g.writers), ("carry", g.carriers), ("read", g.readers)):
            for m in members:
                graph.add_node(f"layer:{m.layer.node}", kind=m.layer.op, module=m.layer.module)
                ends = (f"layer:{m.layer.node}", g.name) if role == "write" else (g.name, f"layer:{m.layer.node}")
                graph.add_edge(*ends, role=role)
    return graph
