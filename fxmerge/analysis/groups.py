"""Groups: labels that are dropped together are one atom, and atoms that can be merged into each other are one group.

1. Ties join labels; connected components are atoms. A pin of one label pins its whole atom.
2. Two atoms are alike if they occur in the same nodes equally often: then every layer that holds one also holds the
   other, and one can be merged into the other. Alike atoms are one part.
3. Parts that share a block (rows that must lose equally many) are decided together: the connected components of a
   networkx graph of parts and blocks are the groups. Channels are merged only within their cell, which is the part and
   the row of each block.

`Grouping.graph` shows users the result; `group_graph` lists its nodes and edges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fxmerge.analysis.copies import copy_numbers
from fxmerge.analysis.group_graph import group_graph
from fxmerge.analysis.members import Builder
from fxmerge.analysis.whole_blocks import atoms, joining
from fxmerge.errors import source_line
from fxmerge.graph.nested import leaves
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Ints, Refusal, group_of_label
from fxmerge.ir.labels import thin
from fxmerge.ir.provenance import Block, Lab, Layer, Pin, Provenance, Tie

if TYPE_CHECKING:
    import networkx as nx


def group(captured: Capture, facts: Provenance) -> Grouping:
    """Find the merge groups. The same graph always gives the same groups, in the same order."""
    atom = atoms(facts)
    facts = replace(facts, blocks=tuple(b for b in facts.blocks if not _solid(b, atom)))
    written = _producer_order(facts, atom)
    pinned = _pinned(facts, atom, set(written.tolist()))
    part, present = _parts(facts, atom, pinned)
    of_group, components = _components(facts, atom, part, pinned, written)
    builder = Builder(captured, facts, atom, of_group, present)
    named = _named([builder.build(number, *inside) for number, inside in components.items()])
    named, stuck = _without_choice(captured, facts, atom, named)
    refusals = (*_refusals(facts, atom, pinned, named, {r.name for r in stuck}), *stuck)
    graph = group_graph(named, refusals, facts.layers)
    return Grouping(tuple(named), refusals, torch.from_numpy(atom), graph)


def _solid(block: Block, atom: Ints) -> bool:
    """Is each row one channel, and each channel several rows? Then they are dropped together, and a rectangle stays.

    This is so for a vector reshaped into an image (channels, height, width), whose places a convolution ties.
    """
    rows = atom[block.labels.numpy()]
    alike = rows.shape[1] > 1 and bool((rows == rows[:, :1]).all())
    return alike and int(np.unique(rows[:, 0], return_counts=True)[1].min()) > 1


def joined(widths: Grouping, facts: Provenance, wholes: Grouping) -> Grouping:
    """The groups whose blocks lose width, together with the groups of blocks that leave whole, named NAME#whole."""
    import networkx as nx

    leaving = np.zeros(int(wholes.atom.max()) + 1, dtype=bool)
    if facts.whole is not None:
        leaving[wholes.atom[facts.whole].numpy()] = True
    named = [replace(g, name=f"{g.name}#whole") for g in wholes.groups if leaving[g.atoms.numpy()].all()]
    graph = nx.compose(widths.graph, group_graph(named, (), facts.layers))
    return replace(widths, graph=graph, wholes=replace(wholes, groups=tuple(named), refusals=(), graph=graph))


def overlaps(grouping: Grouping) -> dict[str, dict[str, float]]:
    """{group that loses width: {group of blocks that leave whole: the share of the former's channels in them}}."""
    if grouping.wholes is None:
        return {}
    narrower, leaving = (group_of_label(part) for part in grouping.parts)
    found: dict[str, dict[str, float]] = {}
    for at, g in enumerate(grouping.groups):
        inside = leaving[narrower == at]
        which, count = np.unique(inside[inside >= 0], return_counts=True)
        shares = (count / len(inside)).tolist()
        if shares:
            found[g.name] = {grouping.wholes.groups[w].name: s for w, s in zip(which.tolist(), shares, strict=True)}
    return found


def aligned(facts: Provenance, grouping: Grouping, groups: Sequence[Group]) -> Provenance:
    """The same facts, with the channels at one place of these groups' blocks tied to each other."""
    inside = torch.zeros(int(grouping.atom.max()) + 1, dtype=torch.bool)
    inside[torch.cat([g.atoms for g in groups])] = True
    touched, kept, ties = inside[grouping.atom], [], list(facts.ties)
    for block in facts.blocks:
        if bool(touched[block.labels].any()):
            first, others = block.labels[:1].expand_as(block.labels[1:]), block.labels[1:]
            ties.append(Tie(block.node, first.reshape(-1), others.reshape(-1)))
        else:
            kept.append(block)
    return replace(facts, ties=tuple(ties), blocks=tuple(kept))


def _pinned(facts: Provenance, atom: Ints, written: set[int]) -> dict[int, Pin]:
    """The first pin of each pinned atom. A block is pinned if one of its atoms is, or is written by no layer."""
    pinned: dict[int, Pin] = {
        int(atom[0]): Pin(torch.zeros(0), "meets values that are not channels of a layer", "", "")
    }
    for pin in facts.pins:
        for a in np.unique(atom[pin.labels.numpy()]):
            pinned.setdefault(int(a), pin)
    for block in facts.blocks:
        for a in set(np.unique(atom[block.labels.numpy()]).tolist()) - written:
            pinned.setdefault(a, Pin(block.labels, "is in one block with zeros or a raw parameter", block.node, ""))
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
    """(a number for each atom, equal for atoms whose copies are in the same nodes; node -> the atoms in it)."""
    copy = _copies(facts, atom)
    random = np.random.default_rng(0)  # a random 64-bit word for each node; different sets of nodes have different sums
    words = np.zeros(int(atom.max()) + 1, dtype=np.uint64)
    present: dict[str, Ints] = {}
    inside: Ints
    holders = [(name, thin(t)) for name, t in facts.labels.items() if name not in facts.views]
    holders += [(name, thin(v.t)) for name, value in facts.values.items() for v in leaves(value) if isinstance(v, Lab)]
    for layer in facts.layers:
        holders += [("", t) for t in (layer.writes, layer.carries) if t is not None]
    for name, labels in holders:
        held = labels.numpy().reshape(-1)
        number, atoms_held = copy[held], atom[held]
        copies = int(number.max(initial=0)) + 1
        word = random.integers(1, 2**63, copies, dtype=np.uint64)  # a slice may take only one copy of a channel
        if copies == 1:
            times = np.bincount(atoms_held)
            inside = np.flatnonzero(times)
            words[inside] += times[inside].astype(np.uint64) * word
        else:
            inside = np.unique(atoms_held)
            np.add.at(words, atoms_held, word[number])
        if name:
            present[name] = np.union1d(present[name], inside) if name in present else inside
    return np.unique(words, return_inverse=True)[1].astype(np.int64), present


def _copies(facts: Provenance, atom: Ints) -> Ints:
    """Which copy of its atom each label is, (label_count,): 0, 1, ... along the axis of its parameter."""
    copy = np.zeros(len(atom), dtype=np.int64)
    for labels in facts.params.values():
        for along in labels.axes.values():
            held = along.numpy().reshape(-1)
            inside = atom[held]
            if np.bincount(inside, minlength=1).max() > 1:
                copy[held] = copy_numbers(inside)
    return copy


def _producer_order(facts: Provenance, atom: Ints) -> Ints:
    """Atoms in the order in which layers write them."""
    written = [atom[layer.writes.numpy()] for layer in facts.layers if layer.writes is not None]
    if not written:
        return np.zeros(0, dtype=np.int64)
    everything = np.concatenate(written)
    return everything[np.sort(np.unique(everything, return_index=True)[1])]


def _components(
    facts: Provenance, atom: Ints, part: Ints, pinned: dict[int, Pin], order: Ints
) -> tuple[Ints, dict[int, tuple[Ints, Ints]]]:
    """Join parts that share blocks: (the group of each atom or -1, group -> (its atoms in order, their cells))."""
    import networkx as nx

    free = order[~np.isin(order, list(pinned))]
    graph: nx.Graph[tuple[str, int]] = nx.Graph()
    graph.add_nodes_from(("part", p) for p in dict.fromkeys(part[free].tolist()))
    rows = np.zeros(int(atom.max()) + 1, dtype=np.int64)  # a number for each combination of block rows
    held, combinations = np.isin(np.arange(len(rows)), list(pinned)), 1
    for number, block in enumerate(facts.blocks):
        inside = atom[block.labels.numpy()]
        if held[inside].any():
            continue
        graph.add_edges_from((("part", p), ("block", number)) for p in np.unique(part[inside]).tolist())
        for at, row in enumerate(inside):
            here, times = np.unique(row, return_counts=True)
            rows[here] = (rows[here] * (len(inside) + 1) + at + 1) * (inside.shape[1] + 1) + times
        touched = np.unique(inside)
        found, which = np.unique(rows[touched], return_inverse=True)
        rows[touched] = combinations + which
        combinations += len(found)
    component_of = {
        node: number for number, component in enumerate(nx.connected_components(graph)) for node in component
    }
    parts, of_part = np.unique(part[free], return_inverse=True)
    component = np.array([component_of["part", p] for p in parts.tolist()], dtype=np.int64)[of_part]
    of_group = np.full(int(atom.max()) + 1, -1, dtype=np.int64)
    cells: dict[int, tuple[Ints, Ints]] = {}
    for number, which in enumerate(dict.fromkeys(component.tolist())):
        inside = free[component == which]
        cell = np.unique(part[inside] * combinations + rows[inside], return_inverse=True)[1]
        of_group[inside] = number
        cells[number] = (inside, cell.astype(np.int64))
    return of_group, cells


def _named(found: list[Group]) -> list[Group]:
    """The groups with unique names: the second group that is named after a layer becomes `layer#2`."""
    seen: dict[str, int] = defaultdict(int)
    named = []
    for g in found:
        seen[g.name] += 1
        named.append(replace(g, name=g.name if seen[g.name] == 1 else f"{g.name}#{seen[g.name]}"))
    return named


def _without_choice(
    captured: Capture, facts: Provenance, atom: Ints, groups: list[Group]
) -> tuple[list[Group], list[Refusal]]:
    """(the groups that can lose channels, refusals of the others).

    Those hold one channel of each kind in their blocks, or one channel that is many rows of a layer, all tied.
    """
    able: list[Group] = []
    refused: dict[tuple[str, str, str], int] = defaultdict(int)
    for g in groups:
        several = [m for m in g.producers if m.where.numel() > 1]
        if len(torch.unique(g.cells)) < g.channels or not (g.blocks or several):
            able.append(g)
            continue
        inside = np.zeros(int(atom.max()) + 1, dtype=bool)
        inside[g.atoms.numpy()] = True
        if g.blocks:
            block = next(b for b in facts.blocks if inside[atom[b.labels.numpy()]].all())
            why = f"the blocks at {block.node} must lose equally many channels, and none has two to choose from"
            where = block.where
        else:
            node = joining(facts, several[0].layer)
            why = f"its channels are tied to each other at {node}: all of them would leave, or none"
            where = next((source_line(n) for n in captured.module.graph.nodes if n.name == node), "")
        modules = {m.layer.module: len(m.channels) if g.blocks else m.where.numel() for m in g.producers}
        for name, channels in modules.items():  # halves of a layer's channels may be two groups
            refused[name, why, where] += channels
    return able, [Refusal(name, channels, why, where) for (name, why, where), channels in refused.items()]


def _refusals(
    facts: Provenance, atom: Ints, pinned: dict[int, Pin], groups: list[Group], refused_for_blocks: set[str]
) -> tuple[Refusal, ...]:
    """One refusal for each producer and reason, and for each other layer that is in no group."""
    found: dict[tuple[str, str, str], int] = defaultdict(int)

    def add(layer: Layer, labels: Tensor) -> None:
        for a in np.unique(atom[labels.numpy()]).tolist():
            if a in pinned:
                found[layer.module, pinned[a].reason, pinned[a].where] += 1

    for layer in facts.layers:
        if layer.writes is not None:
            add(layer, layer.writes)
    named = {name for name, *_ in found} | refused_for_blocks
    named |= {m.layer.module for g in groups for m in (*g.producers, *g.per_channel_params, *g.consumers)}
    for layer in facts.layers:
        labels = layer.reads if layer.carries is None else layer.carries
        if layer.module not in named and labels is not None:
            add(layer, labels)
    named |= {name for name, *_ in found}
    refused = [Refusal(name, channels, reason, where) for (name, reason, where), channels in found.items()]
    left = [u for u in facts.untouched if u.module not in named]
    return (*refused, *(Refusal(u.module, u.channels, u.reason, u.where) for u in left))
