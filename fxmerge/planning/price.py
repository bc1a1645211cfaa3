"""The exact cost of a model as a function of the channels that its groups keep, without building the merged model.

A parameter's elements and an op's products are counted as the product of the lengths of axes. The length of an axis
with labels is the number of labels that are alive, a linear function of the channels that each cell keeps (`Price` in
methods/allocation.py). An op's cost in the original is the one given by torch.utils.flop_counter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.analysis.attentions import Attention
from fxmerge.ir.groups import Group, Grouping
from fxmerge.ir.labels import thin, varying
from fxmerge.ir.provenance import Contraction, Layer, ParamLabels, Provenance
from fxmerge.methods.allocation import Floats, Price

Cells = NDArray[np.int64]
LARGEST = 2**22  # places at which the two operands of a contraction are compared, at most


Width = tuple[tuple[int, ...], ...]  # a sum of products of rows


class _Pricer:
    """Collects the terms of a `Price`, with each distinct linear width as one row of a matrix.

    Where blocks may leave whole besides (`Grouping.wholes`), a label is alive if its channel and its block are. All
    blocks lose equally many channels, so that of the labels in a cell of blocks a share of k / n is left, with k of n
    blocks kept, whatever its channels have lost: a width is a sum of products of linear ones.
    """

    def __init__(self, groups: Sequence[Group], grouping: Grouping) -> None:
        self.slots: dict[str, slice] = {}
        self.atoms = [part.atom.numpy() for part in grouping.parts]  # (label_count,) for the widths, and the blocks
        self.cells: list[Cells] = []  # (label_count,) the cell of each label, -1 for none; likewise
        sizes: list[Floats] = []
        for group in groups:
            own = np.bincount(group.cells.numpy()).astype(np.float64)
            start = sum(len(s) for s in sizes)
            self.slots[group.name] = slice(start, start + len(own))
            sizes.append(own)
        for part, atom in zip(grouping.parts, self.atoms, strict=True):
            names, of_atom = {g.name for g in part.groups}, np.full(int(atom.max()) + 1, -1, dtype=np.int64)
            for group in groups:
                if group.name in names:
                    of_atom[group.atoms.numpy()] = group.cells.numpy() + self.slots[group.name].start
            self.cells.append(of_atom[atom])
        self.full = np.concatenate([np.zeros(0), *sizes])
        self.rows: dict[tuple[float, bytes], int] = {}
        self.widths: list[Floats] = []
        self.fixed: list[float] = []
        self.terms: list[tuple[float, list[int]]] = []
        self.original = 0.0

    def width(self, labels: Tensor) -> Width:
        """How many of the labels are alive."""
        index = labels.reshape(-1).numpy()
        return self.counted([cells[index] for cells in self.cells])

    def counted(self, cells: Sequence[Cells]) -> Width:
        """How many labels in these cells are alive. cells: (m,) for the widths, and for the blocks if there are any."""
        of_width, *of_blocks = cells
        if not of_blocks:
            return ((self._row(of_width),),)
        (blocks,) = of_blocks
        return tuple(
            (self._row(of_width[blocks == cell]), *([self._row(np.array([cell]))] if cell >= 0 else []))
            for cell in np.unique(blocks)
        )

    def _row(self, cells: Cells) -> int:
        """The row that counts how many labels in these cells are alive."""
        held = np.bincount(cells[cells >= 0], minlength=len(self.full)) / np.maximum(self.full, 1)
        fixed = float((cells < 0).sum())
        key = (fixed, held.tobytes())
        if key not in self.rows:
            self.rows[key] = len(self.widths)
            self.widths.append(held)
            self.fixed.append(fixed)
        return self.rows[key]

    def add(self, total: float, factors: Sequence[Width]) -> None:
        """Adds a product of widths, scaled so that it is `total` in the original."""
        whole = prod(sum(prod(self._whole(row) for row in rows) for rows in width) for width in factors)
        self.original += total
        if total:
            self.multiplied(total / whole, factors)

    def multiplied(self, coefficient: float, factors: Sequence[Width]) -> None:
        """Adds a coefficient times a product of widths, as the terms of which it is the sum."""
        self.terms += [(coefficient, [row for rows in chosen for row in rows]) for chosen in product(*factors)]

    def _whole(self, row: int) -> float:
        """A linear width in the original."""
        return float(self.widths[row] @ self.full) + self.fixed[row]

    def price(self) -> Price:
        from scipy.sparse import csr_array

        most = max([1, *(len(f) for _, f in self.terms)])
        last = len(self.widths)
        factors = np.array([f + [last] * (most - len(f)) for _, f in self.terms], dtype=np.int64).reshape(-1, most)
        rows = np.stack([*self.widths, np.zeros(len(self.full))])
        coefficients = np.array([c for c, _ in self.terms])
        fixed = np.array([*self.fixed, 1.0])
        return Price(
            slots=self.slots,
            full=self.full,
            coefficients=coefficients,
            factors=factors,
            widths=csr_array(rows),
            fixed=fixed,
            original=self.original,
        )


def parameters_price(
    facts: Provenance,
    groups: Sequence[Group],
    grouping: Grouping,
    counted: Mapping[str, int],
    biases: Sequence[Layer] = (),
) -> Price:
    """The elements of some parameters, and of the biases that refit will give these layers.

    counted: {path: elements in the original}, with shared parameters once (`counted.parameters_within`)
    """
    pricer = _Pricer(groups, grouping)
    for path, elements in counted.items():
        pricer.add(elements, _along(pricer, facts.params[path]) if path in facts.params else [])
    for layer in biases:
        labels = layer.writes if layer.writes is not None else layer.carries
        assert labels is not None
        pricer.multiplied(1.0, [pricer.width(labels)])
    return pricer.price()


def flops_price(facts: Provenance, groups: Sequence[Group], grouping: Grouping, counted: Mapping[str, int]) -> Price:
    """The FLOPs of one run on the example inputs. counted: those of the original, by node (`counted.flops_within`)."""
    pricer = _Pricer(groups, grouping)
    layers: dict[str, list[Layer]] = {}
    for layer in facts.layers:
        if layer.reads is not None or layer.operation.is_depthwise:
            layers.setdefault(layer.node, []).append(layer)
    products: dict[str, list[Contraction]] = {}
    for contraction in facts.contractions:
        products.setdefault(contraction.node, []).append(contraction)
    for node, flops in counted.items():
        if node in layers:
            weights = [facts.params[layer.params["weight"]] for layer in layers[node]]
            elements = [prod(t.numel() for t in w.axes.values()) for w in weights]  # several in a recurrent layer
            for weight, size in zip(weights, elements, strict=True):
                pricer.add(flops * size / sum(elements), _along(pricer, weight))
        elif node in products:
            sizes = [prod(_sizes(c).values()) for c in products[node]]
            for contraction, size in zip(products[node], sizes, strict=True):
                pricer.add(flops * size / sum(sizes), list(_contracted(pricer, contraction)))
        else:  # a map over positions, the same for every channel; or an op without a rule, whose channels are all kept
            labels = facts.labels.get(node)
            pricer.add(flops, [pricer.width(thin(labels))] if labels is not None else [])
    return pricer.price()


def cache_price(groups: Sequence[Group], grouping: Grouping, counted: Sequence[Attention]) -> Price:
    """The bytes of the keys and values of these attentions that a key-value cache stores for each token."""
    pricer = _Pricer(groups, grouping)
    for one in counted:
        for labels, size in zip((one.keys, one.values), one.sizes, strict=True):
            pricer.add(len(labels) * size, [pricer.width(labels)])
    return pricer.price()


def _along(pricer: _Pricer, labels: ParamLabels) -> list[Width]:
    """The widths of a parameter's axes that have labels: its number of elements is proportional to their product."""
    if labels.elements is not None:
        return [pricer.width(labels.elements)]
    found = []
    for axis, along in labels.axes.items():
        if axis == 1 and labels.groups > 1:
            index = along.reshape(labels.groups, -1).numpy()
            rows = [atom[index] for atom in pricer.atoms]
            leaving = [bool((r == r[:, :1]).all()) for r in rows]  # whole rows, so that the others stay as wide
            cells = [c[index].reshape(-1) for c in pricer.cells]
            if not all(leaving):
                found.append(
                    pricer.counted([np.full_like(c, -1) if w else c for c, w in zip(cells, leaving, strict=True)])
                )
        else:
            found.append(pricer.width(along))
    return found


def _sizes(contraction: Contraction) -> dict[str, int]:
    """The length of each axis of a contraction, by its letter."""
    sizes: dict[str, int] = {}
    for labels, letters in zip((contraction.left, contraction.right), contraction.letters, strict=True):
        sizes |= {c: max(s, sizes.get(c, 1)) for c, s in zip(letters, labels.shape, strict=True)}
    return sizes


def _contracted(pricer: _Pricer, contraction: Contraction) -> Iterator[Width]:
    """The widths whose product is proportional to a contraction's cost, of the axes along which labels vary."""
    sides = ((contraction.left, contraction.letters[0]), (contraction.right, contraction.letters[1]))
    held = [[letters[axis] for axis in varying(labels)] for labels, letters in sides]
    (left, a), (right, b) = ((thin(t).squeeze(), axes) for (t, _), axes in zip(sides, held, strict=True))
    axes = list(dict.fromkeys(a + b))
    if set(a) & set(b) and prod(_sizes(contraction)[c] for c in axes) <= LARGEST:
        left, right = (_spread(t, own, axes) for t, own in ((left, a), (right, b)))
        one, other = (x.reshape(-1).numpy() for x in torch.broadcast_tensors(left, right))  # type: ignore[no-untyped-call]
        cells = [(c[one], c[other]) for c in pricer.cells]
        apart = [atom[one] != atom[other] for atom in pricer.atoms]
        met = [(x >= 0) & (y >= 0) & differ for (x, y), differ in zip(cells, apart, strict=True)]
        if not any(bool(m.any()) for m in met):  # each channel is multiplied with itself only
            yield pricer.counted([np.where(x >= 0, x, y) for x, y in cells])
            return
    for labels, own in ((left, a), (right, b)):
        if own:
            yield pricer.width(labels)


def _spread(labels: Tensor, own: Sequence[str], axes: Sequence[str]) -> Tensor:
    """Labels with the axes `own`, permuted and expanded with axes of length 1 to broadcast over `axes`."""
    return labels.permute([own.index(c) for c in axes if c in own]).reshape(
        [labels.shape[own.index(c)] if c in own else 1 for c in axes]
    )
