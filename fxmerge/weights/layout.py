"""The layout of a layer's weight: its input columns, the sizes that a module keeps of it, and the memory format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fxmerge.ir.provenance import Layer


def out_first(weight: Tensor, layer: Layer) -> Tensor:
    """A producer's weight with its output axis first: (out, ...), or (experts * out, in)."""
    if layer.is_stacked:
        each = weight.transpose(1, 2) if layer.transposed else weight  # (experts, out, in)
        return each.flatten(0, 1) if layer.writes_apart else each.transpose(0, 1)
    if not layer.transposed:
        return weight
    if layer.groups == 1:
        return weight.movedim(1, 0)
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, in/groups, out/groups, *kernel)
    return split.movedim(2, 1).flatten(0, 1)


def from_out_first(rows: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `out_first`; `like` has the shape of the weight."""
    if layer.is_stacked:
        each = rows.view(len(like), -1, rows.size(-1)) if layer.writes_apart else rows.transpose(0, 1)
        return each.transpose(1, 2) if layer.transposed else each
    if not layer.transposed:
        return rows.reshape(like.shape)
    if layer.groups == 1:
        return rows.movedim(0, 1)
    split = rows.reshape(layer.groups, like.size(1), -1, *like.shape[2:])
    return split.movedim(1, 2).reshape(like.shape)


def columns(weight: Tensor, layer: Layer) -> Tensor:
    """A consumer's weight with one row per input place: (groups * in/groups, out/groups * kernel).

    Of stacked experts: (in, experts * out), or (experts * in, out) where each has channels of its own.
    """
    if layer.is_stacked:
        each = weight if layer.transposed else weight.transpose(1, 2)  # (experts, in, out)
        return each.flatten(0, 1) if layer.reads_apart else each.transpose(0, 1).flatten(1)
    if layer.transposed:
        return weight.flatten(1)
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, out/groups, in/groups, *kernel)
    return split.movedim(2, 1).reshape(layer.groups * weight.size(1), -1)


def from_columns(rows: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `columns`; `like` has the shape of the weight."""
    if layer.is_stacked:
        into, experts = 1 if layer.transposed else 2, like.size(0)
        if layer.reads_apart:
            each = rows.view(experts, like.size(into), -1)
        else:
            each = rows.reshape(like.size(into), experts, -1).transpose(0, 1)
        return each if layer.transposed else each.transpose(1, 2)
    if layer.transposed:
        return rows.reshape(like.shape)
    split = rows.reshape(layer.groups, like.size(1), like.size(0) // layer.groups, *like.shape[2:])
    return split.movedim(1, 2).reshape(like.shape)


# attribute of a module -> the axis of the weight that it is the size of
_SIZES: dict[str, int] = {
    "in_features": 1,
    "out_features": 0,
    "num_features": 0,
    "num_parameters": 0,
    "num_channels": 0,
    "num_embeddings": 0,
    "embedding_dim": 1,
}


def resize(owner: nn.Module, shape: Sequence[int], groups: int, transposed: bool) -> None:
    """Updates the sizes that a module keeps of its weight: in_channels, num_features, normalized_shape, ...

    shape: of the weight; for a norm without one, of what it has one value for each of: its channels
    """
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        resize_recurrent(owner)
        return
    held: dict[str, Any] = owner.__dict__
    for attribute, axis in _SIZES.items():
        if isinstance(getattr(owner, attribute, None), int) and axis < len(shape):
            held[attribute] = shape[axis]
    into, out = (0, 1) if transposed else (1, 0)
    if hasattr(owner, "in_channels") and hasattr(owner, "out_channels"):
        held["groups"] = groups
        held["in_channels"] = shape[into] * (1 if transposed else groups)
        held["out_channels"] = shape[out] * (groups if transposed else 1)
    if hasattr(owner, "normalized_shape"):
        held["normalized_shape"] = tuple(shape)


def resize_recurrent(owner: nn.RNNBase | nn.RNNCellBase) -> None:
    """Updates the sizes that a recurrent layer keeps, and its list of weights, to its parameters."""
    if isinstance(owner, nn.RNNCellBase):
        owner.hidden_size, owner.input_size = owner.weight_hh.size(1), owner.weight_ih.size(1)
        return
    first = owner.get_parameter("weight_ih_l0")
    owner.hidden_size, owner.input_size = first.size(0) // {"LSTM": 4, "GRU": 3}.get(owner.mode, 1), first.size(1)
    if owner.proj_size:
        owner.proj_size = owner.get_parameter("weight_hr_l0").size(0)
    owner._init_flat_weights()
