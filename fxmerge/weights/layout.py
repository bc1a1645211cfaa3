"""The layout of a layer's weight: its input columns, and the sizes that a module keeps of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fxmerge.ir.provenance import Layer


def out_first(weight: Tensor, layer: Layer) -> Tensor:
    """A producer's weight with its output axis first: (out, ...)."""
    if layer.is_stacked:
        return weight.movedim(2 if layer.transposed else 1, 0)
    if not layer.transposed:
        return weight
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, in/groups, out/groups, *kernel)
    return split.movedim(2, 1).flatten(0, 1)


def from_out_first(rows: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `out_first`; `like` has the shape of the weight."""
    if layer.is_stacked:
        return rows.movedim(0, 2 if layer.transposed else 1)
    if not layer.transposed:
        return rows.reshape(like.shape)
    split = rows.reshape(layer.groups, like.size(1), -1, *like.shape[2:])
    return split.movedim(1, 2).reshape(like.shape)


def columns(weight: Tensor, layer: Layer) -> Tensor:
    """A consumer's weight with one row per input place: (groups * in/groups, out/groups * kernel)."""
    if layer.is_stacked:
        return weight.movedim(1 if layer.transposed else 2, 0).flatten(1)
    if layer.transposed:
        return weight.flatten(1)
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, out/groups, in/groups, *kernel)
    return split.movedim(2, 1).reshape(layer.groups * weight.size(1), -1)


def from_columns(rows: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `columns`; `like` has the shape of the weight."""
    if layer.is_stacked:
        into = 1 if layer.transposed else 2
        return rows.reshape(like.size(into), like.size(0), like.size(3 - into)).movedim(0, into)
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


def resize(owner: nn.Module, sized: Tensor, groups: int, transposed: bool) -> None:
    """Updates the sizes that a module keeps of its weight: in_channels, num_features, normalized_shape, ...

    sized: the weight; for a norm without one, another of its tensors of the same length
    """
    held: dict[str, Any] = owner.__dict__
    for attribute, axis in _SIZES.items():
        if isinstance(getattr(owner, attribute, None), int) and axis < sized.dim():
            held[attribute] = sized.size(axis)
    into, out = (0, 1) if transposed else (1, 0)
    if hasattr(owner, "in_channels") and hasattr(owner, "out_channels"):
        held["groups"] = groups
        held["in_channels"] = sized.size(into) * (1 if transposed else groups)
        held["out_channels"] = sized.size(out) * (groups if transposed else 1)
    if hasattr(owner, "normalized_shape"):
        held["normalized_shape"] = tuple(sized.shape)
