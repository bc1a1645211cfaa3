"""Rebuilds a parameter from some of its entries, in a given order, by the labels of its axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxmerge.ir.labels import compact
from fxmerge.ir.provenance import ParamLabels
from fxmerge.methods.linalg import BITE
from fxmerge.weights.by_path import Weights


def places(labels: ParamLabels) -> list[Tensor]:
    """The label tensors of one parameter: one for each axis, or one for all elements."""
    return [*labels.axes.values(), *([] if labels.elements is None else [labels.elements])]


def gather(weights: Weights, labels: ParamLabels, pick: Callable[[Tensor], Tensor]) -> None:
    """Replaces a parameter by a selection of its own entries.

    pick: maps the labels (m,) along an axis, or of all elements, to the places (m',) to take, in order
    """
    value = weights[labels.path].detach()
    dtype = value.dtype
    if value.is_floating_point() and value.element_size() == 1:
        value = value.view(torch.uint8)  # older versions of torch do not index float8
    if labels.elements is not None:
        chosen = pick(labels.elements.flatten())
        taken = torch.zeros(labels.elements.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        shape = compact(torch.arange(labels.elements.numel()).view(labels.elements.shape), taken)[0].shape
        weights.put(labels.path, value.flatten()[chosen.to(value.device)].reshape(shape).view(dtype))
        return
    if any(along.dim() > 1 for along in labels.axes.values()):
        value = _of_experts(value, labels, pick)
    elif labels.groups == 1:
        value = _taken(value, {axis: pick(along).to(value.device) for axis, along in labels.axes.items()})
    else:
        # each group of the weight (groups, out/groups, in/groups, *kernel) has its own places
        split = value.reshape(labels.groups, -1, *value.shape[1:])
        out, into = pick(labels.axes[0]), pick(labels.axes[1])
        block = torch.unique_consecutive(out // split.size(1))  # groups may change places, or be dropped
        out, into = out.view(len(block), -1) % split.size(1), into.view(len(block), -1) % split.size(2)
        value = split[block[:, None, None], out[:, :, None], into[:, None, :]].flatten(0, 1)
    weights.put(labels.path, value.contiguous().view(dtype))


def _of_experts(value: Tensor, labels: ParamLabels, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """The entries of stacked matrices at the places to take, which each expert may have of its own along an axis."""
    for axis, along in labels.axes.items():
        chosen = pick(along.flatten()).to(value.device)
        if along.dim() == 1:
            value = value.index_select(axis, chosen)
        else:
            own = (chosen % along.size(1)).view(len(along), -1)
            value = torch.stack([one.index_select(axis - 1, i) for one, i in zip(value, own, strict=True)])
    return value


_SMALL = 2**20  # elements; a smaller tensor and its intermediate copies fit into the cache


def _taken(value: Tensor, index: dict[int, Tensor]) -> Tensor:
    """The entries of a tensor at these places, by axis. For a large tensor, rows and columns are taken in chunks."""
    if set(index) != {0, 1} or value.numel() < _SMALL:
        for axis, places_taken in index.items():
            value = value.index_select(axis, places_taken)
        return value
    taken = value.new_empty(len(index[0]), len(index[1]), *value.shape[2:])
    for some, target in zip(torch.split(index[0], BITE), torch.split(taken, BITE), strict=True):
        torch.index_select(value.index_select(0, some), 1, index[1], out=target)
    return taken
