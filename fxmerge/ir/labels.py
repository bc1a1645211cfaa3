"""Arithmetic of label tensors: which axes labels vary along, and what is left when some labels are dropped.

A label tensor is an int64 tensor of an activation's shape. Each entry is the number of the channel at that place; 0
marks a place that holds no channel that could be dropped. One invariant keeps the analysis cheap: an axis has stride 0
if and only if the labels do not vary along it, so a (32, 256, 56, 56) activation costs 256 integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIXED = 0  # the label of places that can never be dropped


def thin(labels: Tensor) -> Tensor:
    """The same labels with every axis of stride 0 narrowed to length 1: a view, never a copy."""
    for axis in range(labels.dim()):
        if labels.stride(axis) == 0 and labels.size(axis) > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def simplify(labels: Tensor) -> Tensor:
    """The same labels with stride 0 on every axis that they do not vary along (the module's invariant)."""
    shape = labels.shape
    if labels.numel() == 0:
        return labels
    labels = thin(labels)
    for axis in range(labels.dim()):
        if labels.size(axis) > 1:
            first = labels.narrow(axis, 0, 1)
            if bool((labels == first).all()):
                labels = first
    if labels.numel() < labels.untyped_storage().nbytes() // 16:  # do not keep a large tensor alive for a small view
        labels = labels.clone()
    return labels.expand(shape)


def varying(labels: Tensor) -> tuple[int, ...]:
    """The axes that the labels vary along."""
    return tuple(a for a in range(labels.dim()) if labels.size(a) > 1 and labels.stride(a) != 0)


def innermost(labels: Tensor) -> int:
    """Of the axes that the labels vary along, the one along which they are nearest to each other, or the last of such.

    Layers number their channels one after the other, so this is an axis of channels of one layer. Axes along which
    layers are stacked, or heads, are not, wherever they stand.
    """
    small = thin(labels)

    def step(axis: int) -> int:
        one, other = small.narrow(axis, 1, small.size(axis) - 1), small.narrow(axis, 0, small.size(axis) - 1)
        steps = (one - other).abs()[(one != FIXED) & (other != FIXED) & (one != other)]
        return int(steps.min()) if steps.numel() else torch.iinfo(torch.int64).max

    return min(reversed(varying(labels)), key=step)


def fixed(shape: Sequence[int]) -> Tensor:
    """The labels of a tensor that holds no channels: FIXED everywhere."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def spread(channels: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Labels (C,) along `axis` of a tensor of that shape."""
    view = [1] * len(shape)
    view[axis] = -1
    return simplify(channels.reshape(view).expand(tuple(shape)))


def holds(labels: Tensor) -> bool:
    """Are there any channels?"""
    return bool((thin(labels) != FIXED).any())


def along(dim: int | list[int] | tuple[int, ...] | None, labels: Tensor) -> set[int]:
    """The axes that a `dim` argument means; None means all."""
    dims = range(labels.dim()) if dim is None else ([dim] if isinstance(dim, int) else dim)
    return {d % max(labels.dim(), 1) for d in dims}


def without(labels: Tensor, axes: set[int], keepdim: bool) -> Tensor:
    """The labels after a reduction over axes that they do not vary along."""
    for axis in sorted(axes, reverse=True):
        labels = labels.narrow(axis, 0, 1) if keepdim else labels.select(axis, 0)
    return labels


def rows(labels: Tensor, axes: Sequence[int]) -> Tensor:
    """The labels with a row for each place along `axes`, (places, others); other axes only where they vary."""
    small = thin(labels)
    return small.movedim(tuple(axes), tuple(range(len(axes)))).flatten(0, len(axes) - 1).flatten(1)


def numbers(labels: Tensor) -> Tensor:
    """The distinct labels without FIXED, in ascending order."""
    found: Tensor = torch.unique(thin(labels))
    return found.masked_select(found != FIXED)


def compact(labels: Tensor, alive: Tensor) -> list[Tensor]:
    """What is left of a label tensor when every label with `alive[label]` False is dropped.

    Returns the label tensors of the rectangles that the remaining labels can fill: usually one; none if they fill no
    rectangle; several if blocks lost different channels but equally many along more than one axis (the caller knows
    which one is meant). Whole slices are dropped first; then ragged rows are packed along one axis.
    """
    small = thin(labels)
    mask = alive[small]
    if bool(mask.all()):
        return [labels]
    if not bool(mask.any()):
        return []
    for axis in range(small.dim()):
        if small.size(axis) > 1:
            others = [a for a in range(small.dim()) if a != axis]
            stays = mask.amax(others) if others else mask
            if not bool(stays.all()):
                index = stays.nonzero().flatten()
                small, mask = small.index_select(axis, index), mask.index_select(axis, index)
    grown = [labels.size(a) if small.size(a) == 1 and labels.stride(a) == 0 else -1 for a in range(small.dim())]
    if bool(mask.all()):
        return [small.expand(grown)]
    closed = []
    for axis in reversed(range(small.dim())):
        count = mask.sum(axis)
        if small.size(axis) > 1 and bool((count == count.flatten()[0]).all()):
            moved, kept = small.movedim(axis, -1), mask.movedim(axis, -1)
            rows = moved[kept].reshape(*moved.shape[:-1], -1)
            closed.append(rows.movedim(-1, axis).expand(grown))
    return closed
