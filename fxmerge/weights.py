"""Weights: reading and rebuilding a module's parameters by path. Helpers of the stages that write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .ir import Layer, ParamLabels
from .labels import compact


def parameter(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)  # type: ignore[no-any-return]


def assign(module: nn.Module, path: str, value: Tensor) -> None:
    """Put a tensor in a parameter's or buffer's place, wherever the module holds that very tensor."""
    old = parameter(module, path)
    for owner in module.modules():
        for name, held in list(owner._parameters.items()):
            if held is old:
                owner._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
                value = owner._parameters[name]  # type: ignore[assignment]
        for name, buffer in list(owner._buffers.items()):
            if buffer is old:
                owner._buffers[name] = value
        if owner.__dict__.get(path.rpartition(".")[2]) is old:
            owner.__dict__[path.rpartition(".")[2]] = value


def columns(weight: Tensor, layer: Layer) -> Tensor:
    """A reader's weight with one row for each input place: (groups * in/groups, out/groups * kernel)."""
    if layer.transposed:
        return weight.flatten(1)
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, out/groups, in/groups, *kernel)
    return split.movedim(2, 1).reshape(layer.groups * weight.size(1), -1)


def from_columns(rows: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `columns`."""
    if layer.transposed:
        return rows.reshape(like.shape)
    split = rows.reshape(layer.groups, like.size(1), like.size(0) // layer.groups, *like.shape[2:])
    return split.movedim(1, 2).reshape(like.shape)


def places(labels: ParamLabels) -> list[Tensor]:
    """The label tensors of one parameter."""
    return [*labels.axes.values(), *([] if labels.elements is None else [labels.elements])]


def gather(module: nn.Module, labels: ParamLabels, pick: Callable[[Tensor], Tensor]) -> None:
    """Rebuild one parameter from its own entries: `pick` maps labels (m,) to the places (m',) to take, in order."""
    value = parameter(module, labels.path)
    if labels.elements is not None:
        chosen = pick(labels.elements.flatten())
        taken = torch.zeros(labels.elements.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        shape = compact(torch.arange(labels.elements.numel()).view(labels.elements.shape), taken)[0].shape
        assign(module, labels.path, value.flatten()[chosen.to(value.device)].reshape(shape))
        return
    if labels.groups == 1:
        for axis, along in labels.axes.items():
            value = value.index_select(axis, pick(along).to(value.device))
    else:
        # each block of a grouped weight takes places of its own: W (groups, out/groups, in/groups, *kernel)
        g = labels.groups
        split = value.reshape(g, -1, *value.shape[1:])
        out = pick(labels.axes[0]).view(g, -1) % split.size(1)
        into = pick(labels.axes[1]).view(g, -1) % split.size(2)
        block = torch.arange(g)[:, None, None]
        value = split[block, out[:, :, None], into[:, None, :]].flatten(0, 1)
    assign(module, labels.path, value.contiguous())
