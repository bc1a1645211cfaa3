"""Whole blocks of channels that may leave (heads of attention, groups of a convolution), rather than a part of each.

A block that leaves whole is one channel with many copies: the labels of each of its rows are tied to each other, and
bonds tie whatever else is dropped with it (the queries, keys, values and scores of a head). Blocks lose width instead
if fewer than two of them are distinct (a channel shuffle spreads each block over all others), or if one must stay.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.ir.labels import FIXED
from fxmerge.ir.provenance import Layer, Provenance, Tie

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def atoms(facts: Provenance) -> Ints:
    """The atom of each label, (label_count,): the connected components of the ties."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    left = torch.cat([t.left for t in facts.ties]) if facts.ties else torch.zeros(0, dtype=torch.int64)
    right = torch.cat([t.right for t in facts.ties]) if facts.ties else left
    size = facts.label_count
    edges = coo_matrix((np.ones(len(left), dtype=np.int8), (left.numpy(), right.numpy())), shape=(size, size))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def joining(facts: Provenance, layer: Layer) -> str:
    """The first node at which two channels that a layer writes are tied to each other, directly or by others; or ""."""
    assert layer.writes is not None
    rows = layer.writes.numpy()
    apart, joined = 0, len(facts.ties)  # numbers of ties after which the rows are still apart, and not any more
    while joined - apart > 1:
        middle = (apart + joined) // 2
        atom = atoms(replace(facts, ties=facts.ties[:middle]))[rows]
        apart, joined = (middle, joined) if len(np.unique(atom)) == len(np.unique(rows)) else (apart, middle)
    return facts.ties[joined - 1].node if facts.ties else ""


def width(facts: Provenance) -> Provenance:
    """The same facts, with the ties and pins that hold if no block leaves whole."""
    ties = [tie for bond in facts.bonds for tie in bond.ties]
    pins = [pin for bond in facts.bonds for pin in bond.pins]
    return replace(facts, ties=(*facts.ties, *ties), pins=(*facts.pins, *pins)) if facts.bonds else facts


def whole(facts: Provenance) -> Provenance:
    """The same facts, with each block that can leave whole as one channel, and the ties and pins of the other bonds."""
    rows = [(b.node, b.labels) for b in facts.blocks] + [(b.node, b.rows) for b in facts.bonds]
    goes = _leaving(facts, rows)
    of_blocks, of_bonds = goes[: len(facts.blocks)], goes[len(facts.blocks) :]
    gone = [bond for bond, go in zip(facts.bonds, of_bonds, strict=True) if go]
    left = [bond for bond, go in zip(facts.bonds, of_bonds, strict=True) if not go]
    leaving = [(node, r) for (node, r), go in zip(rows, goes, strict=True) if go]
    return replace(
        facts,
        ties=(*facts.ties, *(_row_tie(*row) for row in leaving), *(tie for bond in left for tie in bond.ties)),
        pins=(*facts.pins, *(p for b in left for p in b.pins), *(p for b in gone for p in b.held)),
        blocks=tuple(b for b, go in zip(facts.blocks, of_blocks, strict=True) if not go),
        whole=torch.cat([torch.zeros(0, dtype=torch.int64), *(r.flatten() for _, r in leaving)]),
    )


def _leaving(facts: Provenance, rows: list[tuple[str, Tensor]]) -> list[bool]:
    """Does each of these blocks and bonds leave whole? Connected ones leave whole together or not at all.

    If too few of their rows are distinct, the largest blocks are left out and the rest is tried again: they may be
    blocks of blocks, which keep equally many smaller ones inside (queries, keys and values of all heads in a row).
    """
    able = np.array([b.leaves_whole for b in facts.blocks] + [True] * (len(rows) - len(facts.blocks)), dtype=bool)
    size = np.array([r.size(1) if at < len(facts.blocks) else 0 for at, (_, r) in enumerate(rows)])
    while rows:
        goes, few = _together(facts, rows, able)
        few &= size > 0
        if not few.any():
            return goes.tolist()  # type: ignore[no-any-return]
        able &= ~(few & (size == size[few].max()))
    return []


def _together(facts: Provenance, rows: list[tuple[str, Tensor]], able: Bools) -> tuple[Bools, Bools]:
    """(which of the able rows leave whole, which of them have fewer than two distinct rows to choose from)."""
    solid = [not bool((r == FIXED).any()) for _, r in rows]
    tied = [_row_tie(*row) for row, a, s in zip(rows, able, solid, strict=True) if a and s]
    atom = atoms(replace(facts, ties=(*facts.ties, *tied)))
    pinned = np.zeros(int(atom.max()) + 1, dtype=bool)
    for pin in (*facts.pins, *(pin for bond in facts.bonds for pin in bond.held)):
        pinned[atom[pin.labels.numpy()]] = True
    inside = [np.unique(atom[r[r != FIXED].numpy()]) if a else atom[:0] for (_, r), a in zip(rows, able, strict=True)]
    component = _components(inside, len(pinned))
    few = able & np.array([len(at) < 2 for at in inside], dtype=bool)
    stays = few | ~np.array(solid, dtype=bool) | np.array([bool(pinned[at].any()) for at in inside], dtype=bool)
    return able & ~np.isin(component, component[stays & able]), few


def _row_tie(node: str, rows: Tensor) -> Tie:
    return Tie(node, rows[:, :1].expand_as(rows).reshape(-1), rows.reshape(-1))


def _components(inside: list[Ints], count: int) -> Ints:
    """A number for each set of atoms, equal where sets are joined by atoms that they share."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    sets = np.repeat(np.arange(len(inside)), [len(at) for at in inside])
    edges = coo_matrix(
        (np.ones(len(sets), dtype=np.int8), (sets, len(inside) + np.concatenate(inside))),
        shape=(len(inside) + count,) * 2,
    )
    return connected_components(edges, directed=False)[1][: len(inside)].astype(np.int64)
