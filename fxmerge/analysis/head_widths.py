"""Which groups are the values of an attention whose heads are as wide as those of its queries.

Nothing in the mathematics ties the two widths. But code often has one attribute for both, `head_dim`: a model whose
values stay as wide as its queries still fits into its own class.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.ir.groups import Grouping, Ints, group_of_label
from fxmerge.ir.provenance import Contraction, Provenance


@dataclass(frozen=True)
class HeadWidth:
    """The width of an attention's heads, before anything is dropped.

    values, queries: names of groups
    cells:           the cells of the values' group, one for each head, or one for all of them
    places:          {cell of the queries' group: how many of a head's places are in it}
    """

    values: str
    queries: str
    cells: tuple[int, ...]
    places: dict[int, int]


def head_widths(facts: Provenance, grouping: Grouping) -> tuple[HeadWidth, ...]:
    """The attentions whose values have heads as wide as the queries, each head in one cell of a group."""
    of_label, found = group_of_label(grouping), list[HeadWidth]()
    cell_of = torch.full((int(grouping.atom.max()) + 1,), -1)
    for group in grouping.groups:
        cell_of[group.atoms] = group.cells
    head: Tensor | None = None
    for one in facts.contractions:
        scores = _summed(one)
        if scores is not None:
            head = scores
            continue
        value = _along(one.right, one.right.dim() - 1) if not bool((one.left > 0).any()) else None
        if value is None or head is None or len(value) != len(head):
            continue
        queries, values = _group(of_label, head), _group(of_label, torch.unique(one.right))
        if queries < 0 or values < 0:
            continue
        places = Counter(cell_of[grouping.atom[head]].tolist())
        heads = cell_of[grouping.atom[one.right]].flatten(0, -2)
        cells = tuple(torch.unique(heads).tolist())
        if bool((heads == heads[:, :1]).all()) and (queries != values or not set(cells) & set(places)):
            names = grouping.groups[values].name, grouping.groups[queries].name
            found.append(HeadWidth(*names, cells, dict(places)))
    return tuple(found)


def _summed(one: Contraction) -> Tensor | None:
    """The labels of one head along the axis that is summed over; None unless both operands have channels there."""
    for axis, letter in reversed(list(enumerate(one.letters[0]))):
        if letter in one.letters[1]:
            row, other = _along(one.left, axis), _along(one.right, one.letters[1].index(letter))
            if row is not None and other is not None:
                return row
    return None


def _along(labels: Tensor, axis: int) -> Tensor | None:
    """The labels along an axis, at the first place of the others; None unless all are channels that differ."""
    rows = labels.movedim(axis, -1)
    row = rows.reshape(-1, rows.size(-1))[0]
    return row if len(row) > 1 and bool((row > 0).all()) and len(torch.unique(row)) == len(row) else None


def _group(of_label: Ints, labels: Tensor) -> int:
    """The one group of all these labels, or -1."""
    numbers = set(of_label[labels.numpy()].tolist())
    return numbers.pop() if len(numbers) == 1 else -1
