"""The exact cost of a model as a function of the channels that its groups keep, without building the merged model.

A parameter's elements and an op's products are counted as the product of the lengths of axes. The length of an axis
with labels is the number of labels that are alive, a linear function of the channels that each cell keeps (`Price` in
methods/allocation.py). An op's cost in the original is the one given by torch.utils.flop_counter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.analysis.attentions import Attention
from fxmerge.ir.groups import Group
from fxmerge.ir.labels import thin, varying
from fxmerge.ir.provenance import Contraction, Layer, ParamLabels, Provenance
from fxmerge.methods.allocation import Floats, Price

LARGEST = 2**22  # places at which the two operands of a contraction are compared, at most


class _Pricer:
    """Collects the terms of a `Price`, with each distinct width as one row of a matrix."""

    def __init__(self, groups: Sequence[Group], atom: Tensor) -> None:
        self.atom, self.slots = atom, {}
        self.cell = np.full(int(atom.max()) + 1, -1, dtype=np.int64)
        sizes: list[Floats] = []
        for group in groups:
            own = np.bincount(group.cells.numpy())
            start = sum(len(s) for s in sizes)
            self.slots[group.name] = slice(start, start + len(own))
            self.cell[group.atoms.numpy()] = group.cells.numpy() + start
            sizes.append(own.astype(np.float64))
        self.full = np.concatenate([np.zeros(0), *sizes])
        self.rows: dict[tuple[float, bytes], int] = {}
        self.widths: list[Floats] = []
        self.fixed: list[float] = []
        self.terms: list[tuple[float, list[int]]] = []
        self.original = 0.0

    def width(self, labels: Tensor) -> int:
        """The row of the width that counts how many of the labels are alive."""
        return self.counted(self.atom[labels.reshape(-1)].numpy())

    def counted(self, atoms: NDArray[np.int64]) -> int:
        """The row of the width that counts how many of the atoms are alive."""
        cells = self.cell[atoms]
        held = np.bincount(cells[cells >= 0], minlength=len(self.full)) / np.maximum(self.full, 1)
        fixed = float((cells < 0).sum())
        key = (fixed, held.tobytes())
        if key not in self.rows:
            self.rows[key] = len(self.widths)
            self.widths.append(held)
            self.fixed.append(fixed)
        return self.rows[key]

    def add(self, total: float, factors: Sequence[int]) -> None:
        """Adds a term: a product of widths, scaled so that it is `total` in the original."""
        whole = prod(float(self.widths[f] @ self.full) + self.fixed[f] for f in factors)
        self.original += total
        if total:
            self.terms.append((total / whole, list(factors)))

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
    atom: Tensor,
    counted: Mapping[str, int],
    biases: Sequence[Layer] = (),
) -> Price:
    """The elements of some parameters, and of the biases that refit will give these layers.

    counted: {path: elements in the original}, with shared parameters once (`counted.parameters_within`)
    """
    pricer = _Pricer(groups, atom)
    for path, elements in counted.items():
        pricer.add(elements, _along(pricer, facts.params[path]) if path in facts.params else [])
    for layer in biases:
        labels = layer.writes if layer.writes is not None else layer.carries
        assert labels is not None
        pricer.terms.append((1.0, [pricer.width(labels)]))
    return pricer.price()


def flops_price(facts: Provenance, groups: Sequence[Group], atom: Tensor, counted: Mapping[str, int]) -> Price:
    """The FLOPs of one run on the example inputs. counted: those of the original, by node (`counted.flops_within`)."""
    pricer = _Pricer(groups, atom)
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


def cache_price(groups: Sequence[Group], atom: Tensor, counted: Sequence[Attention]) -> Price:
    """The bytes of the keys and values of these attentions that a key-value cache stores for each token."""
    pricer = _Pricer(groups, atom)
    for one in counted:
        for labels, size in zip((one.keys, one.values), one.sizes, strict=True):
            pricer.add(len(labels) * size, [pricer.width(labels)])
    return pricer.price()


def _along(pricer: _Pricer, labels: ParamLabels) -> list[int]:
    """The widths of a parameter's axes that have labels: its number of elements is proportional to their product."""
    if labels.elements is not None:
        return [pricer.width(labels.elements)]
    found = []
    for axis, along in labels.axes.items():
        if axis == 1 and labels.groups > 1:
            rows = pricer.atom[along.reshape(labels.groups, -1)]
            if not bool(
                (rows == rows[:, :1]).all()
            ):  # otherwise whole rows are removed, and the width of the others does not change
                found.append(pricer.width(along))
        else:
            found.append(pricer.width(along))
    return found


def _sizes(contraction: Contraction) -> dict[str, int]:
    """The length of each axis of a contraction, by its letter."""
    sizes: dict[str, int] = {}
    for labels, letters in zip((contraction.left, contraction.right), contraction.letters, strict=True):
        sizes |= {c: max(s, sizes.get(c, 1)) for c, s in zip(letters, labels.shape, strict=True)}
    return sizes


def _contracted(pricer: _Pricer, contraction: Contraction) -> Iterator[int]:
    """The widths whose product is proportional to a contraction's cost, of the axes along which labels vary."""
    sides = ((contraction.left, contraction.letters[0]), (contraction.right, contraction.letters[1]))
    held = [[letters[axis] for axis in varying(labels)] for labels, letters in sides]
    (left, a), (right, b) = ((pricer.atom[thin(t)].squeeze(), axes) for (t, _), axes in zip(sides, held, strict=True))
    axes = list(dict.fromkeys(a + b))
    if set(a) & set(b) and prod(_sizes(contraction)[c] for c in axes) <= LARGEST:
        left, right = (_spread(t, own, axes) for t, own in ((left, a), (right, b)))
        one, other = (x.reshape(-1).numpy() for x in torch.broadcast_tensors(left, right))  # type: ignore[no-untyped-call]
        free, bound = pricer.cell[one] >= 0, pricer.cell[other] >= 0
        if not bool(((one != other) & free & bound).any()):  # each channel is multiplied with itself only
            yield pricer.counted(np.where(free, one, other))
            return
    for atoms, own in ((left, a), (right, b)):
        if own:
            yield pricer.counted(atoms.reshape(-1).numpy())


def _spread(atoms: Tensor, own: Sequence[str], axes: Sequence[str]) -> Tensor:
    """Atoms with the axes `own`, permuted and expanded with axes of length 1 to broadcast over `axes`."""
    return atoms.permute([own.index(c) for c in axes if c in own]).reshape(
        [atoms.shape[own.index(c)] if c in own else 1 for c in axes]
    )
