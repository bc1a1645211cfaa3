"""Two label tensors that meet position by position: the ties and pins that follow."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmerge.ir.labels import FIXED, thin
from fxmerge.ir.provenance import Pin, Tie
from fxmerge.rules.facts import pins_of


def tied(node: fx.Node, left: Tensor, right: Tensor) -> tuple[list[Tie], list[Pin]]:
    """The ties, and the pins of labels that meet FIXED."""
    ties: list[Tie] = []
    pins: list[Pin] = []
    left, right = thin(left), thin(right)
    if left.shape != right.shape:
        left, right, ties, pins = _broadcast(node, left, right)
    left, right = left.flatten(), right.flatten()
    if not bool(torch.minimum(left, right).all()):  # FIXED is 0, and no label is less
        for one, other in ((left, right), (right, left)):
            pins += pins_of(node, other[one == FIXED], "meets values that are not channels of a layer")
        here = (left != FIXED) & (right != FIXED)
        left, right = left[here], right[here]
    differ = left != right
    if not bool(differ.all()):
        left, right = left[differ], right[differ]
    if left.numel():
        ties.append(Tie(node.name, left, right))
    return ties, pins


def _broadcast(node: fx.Node, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, list[Tie], list[Pin]]:
    """Two label tensors broadcast to one shape.

    Where each has an axis that the other lacks, the labels along that axis are first tied to each other, so that
    not every label of one meets every label of the other. Returns those ties and pins too.
    """
    ties: list[Tie] = []
    pins: list[Pin] = []
    sizes = list(zip(left.shape, right.shape, strict=False)) if left.dim() == right.dim() else []
    alone = [(left, [b == 1 for _, b in sizes]), (right, [a == 1 for a, _ in sizes])]
    firsts = [t[tuple(slice(0, 1) if own else slice(None) for own in axes)] for t, axes in alone]
    if sizes and all(f.numel() < t.numel() for f, (t, _) in zip(firsts, alone, strict=True)):
        for first, (t, _) in zip(firsts, alone, strict=True):
            more_ties, more_pins = tied(node, first, t)
            ties, pins = ties + more_ties, pins + more_pins
        left, right = firsts
    left, right = torch.broadcast_tensors(left, right)  # type: ignore[no-untyped-call]
    return left, right, ties, pins
