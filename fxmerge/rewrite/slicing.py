"""Slicing: a parameter is rebuilt from those of its entries that stay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxmerge.ir.labels import compact
from fxmerge.ir.provenance import ParamLabels
from fxmerge.methods.linalg import BITE
from fxmerge.weights.by_path import Weights

MUCH = 2**20  # elements; what is made of less on the way stays in the cache


def places(labels: ParamLabels) -> list[Tensor]:
    """The label tensors of one parameter."""
    return [*labels.axes.values(), *([] if labels.elements is None else [labels.elements])]


def gather(weights: Weights, labels: ParamLabels, pick: Callable[[Tensor], Tensor]) -> None:
    """Rebuild one parameter from its own entries: `pick` maps labels (m,) to the places (m',) to take, in order."""
    value = weights[labels.path].detach()
    if labels.elements is not None:
        chosen = pick(labels.elements.flatten())
        taken = torch.zeros(labels.elements.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        shape = compact(torch.arange(labels.elements.numel()).view(labels.elements.shape), taken)[0].shape
        weights.put(labels.path, value.flatten()[chosen.to(value.device)].reshape(shape))
        return
    if labels.groups == 1:
        value = _taken(value, {axis: pick(along).to(value.device) for axis, along in labels.axes.items()})
    else:
        # each block of a grouped weight takes places of its own: W (groups, out/groups, in/groups, *kernel)
        split = value.reshape(labels.groups, -1, *value.shape[1:])
        out, into = pick(labels.axes[0]), pick(labels.axes[1])
        block = torch.unique_consecutive(out // split.size(1))  # blocks may change places, or leave
        out, into = out.view(len(block), -1) % split.size(1), into.view(len(block), -1) % split.size(2)
        value = split[block[:, None, None], out[:, :, None], into[:, None, :]].flatten(0, 1)
    weights.put(labels.path, value.contiguous())


def _taken(value: Tensor, index: dict[int, Tensor]) -> Tensor:
    """A tensor's entries at these places of its axes; some rows at a time where it loses rows and columns."""
    if set(index) != {0, 1} or value.numel() < MUCH:
        for axis, places_taken in index.items():
            value = value.index_select(axis, places_taken)
        return value
    taken = value.new_empty(len(index[0]), len(index[1]), *value.shape[2:])
    for some, target in zip(torch.split(index[0], BITE), torch.split(taken, BITE), strict=True):
        torch.index_select(value.index_select(0, some), 1, index[1], out=target)
    return taken
