"""Pricing: what a model would cost if its groups kept so many channels, exactly, without building it.

A weight's elements and the products of an op are counted along axes. Along an axis of labels as many places are left as
labels are alive, which is a linear function of the channels that each cell keeps (`allocators.Price`). What an op costs
in the original is what torch.utils.flop_counter counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group
from fxmerge.ir.labels import thin, varying
from fxmerge.ir.provenance import Contraction, Layer, ParamLabels, Provenance
from fxmerge.methods.allocation import Floats, Price

LARGEST = 2**22  # places that a contraction's two operands are compared at, at most


class _Pricer:
    """Widths as rows of a matrix, each once."""

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
        """The row that counts those of the labels that are alive."""
        return self.counted(self.atom[labels.reshape(-1)].numpy())

    def counted(self, atoms: NDArray[np.int64]) -> int:
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
        """A term that is `total` in the original."""
        whole = prod(float(self.widths[f] @ self.full) + self.fixed[f] for f in factors)
        self.original += total
        if total:
            self.terms.append((total / whole, list(factors)))

    def price(self) -> Price:
        most = max([1, *(len(f) for _, f in self.terms)])
        last = len(self.widths)
        factors = np.array([f + [last] * (most - len(f)) for _, f in self.terms], dtype=np.int64).reshape(-1, most)
        rows = np.stack([*self.widths, np.zeros(len(self.full))])
        coefficients = np.array([c for c, _ in self.terms])
        fixed = np.array([*self.fixed, 1.0])
        return Price(self.slots, self.full, coefficients, factors, csr_array(rows), fixed, self.original)


def parameters_price(
    captured: Capture, facts: Provenance, groups: Sequence[Group], atom: Tensor, biases: Sequence[Layer] = ()
) -> Price:
    """Elements of all parameters, shared ones once; and those of biases that these layers will be given."""
    pricer = _Pricer(groups, atom)
    for path, value in captured.module.named_parameters():
        pricer.add(value.numel(), _along(pricer, facts.params[path]) if path in facts.params else [])
    for layer in biases:
        labels = layer.writes if layer.writes is not None else layer.carries
        assert labels is not None
        pricer.terms.append((1.0, [pricer.width(labels)]))
    return pricer.price()


def flops_price(facts: Provenance, groups: Sequence[Group], atom: Tensor, counted: Mapping[str, int]) -> Price:
    """FLOPs of one run on the example inputs, of which the original's nodes take so many (`cost.flops_by_node`)."""
    pricer = _Pricer(groups, atom)
    layers = {layer.node: layer for layer in facts.layers if layer.reads is not None or layer.operation.is_depthwise}
    products: dict[str, list[Contraction]] = {}
    for contraction in facts.contractions:
        products.setdefault(contraction.node, []).append(contraction)
    for node, flops in counted.items():
        if node in layers:
            pricer.add(flops, _along(pricer, facts.params[layers[node].params["weight"]]))
        elif node in products:
            sizes = [prod(_sizes(c).values()) for c in products[node]]
            for contraction, size in zip(products[node], sizes, strict=True):
                pricer.add(flops * size / sum(sizes), list(_contracted(pricer, contraction)))
        else:  # a map over positions, the same for every channel; or an op without a rule, whose channels all stay
            labels = facts.labels.get(node)
            pricer.add(flops, [pricer.width(thin(labels))] if labels is not None else [])
    return pricer.price()


def _along(pricer: _Pricer, labels: ParamLabels) -> list[int]:
    """The widths that a parameter's elements are the product of, but for axes that hold no labels."""
    if labels.elements is not None:
        return [pricer.width(labels.elements)]
    found = []
    for axis, along in labels.axes.items():
        if axis == 1 and labels.groups > 1:
            rows = pricer.atom[along.reshape(labels.groups, -1)]
            if not bool((rows == rows[:, :1]).all()):  # else whole rows leave, and those that stay are as wide as ever
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
    """The widths of the places that a contraction multiplies at, along the axes that labels vary along."""
    sides = ((contraction.left, contraction.letters[0]), (contraction.right, contraction.letters[1]))
    held = [[letters[axis] for axis in varying(labels)] for labels, letters in sides]
    (left, a), (right, b) = ((pricer.atom[thin(t)].squeeze(), axes) for (t, _), axes in zip(sides, held, strict=True))
    axes = list(dict.fromkeys(a + b))
    if set(a) & set(b) and prod(_sizes(contraction)[c] for c in axes) <= LARGEST:
        left, right = (_spread(t, own, axes) for t, own in ((left, a), (right, b)))
        one, other = (x.reshape(-1).numpy() for x in torch.broadcast_tensors(left, right))  # type: ignore[no-untyped-call]
        free, bound = pricer.cell[one] >= 0, pricer.cell[other] >= 0
        if not bool(((one != other) & free & bound).any()):  # channels meet themselves
            yield pricer.counted(np.where(free, one, other))
            return
    for atoms, own in ((left, a), (right, b)):
        if own:
            yield pricer.counted(atoms.reshape(-1).numpy())


def _spread(atoms: Tensor, own: Sequence[str], axes: Sequence[str]) -> Tensor:
    """Atoms over the axes `own`, laid over `axes`."""
    return atoms.permute([own.index(c) for c in axes if c in own]).reshape(
        [atoms.shape[own.index(c)] if c in own else 1 for c in axes]
    )
