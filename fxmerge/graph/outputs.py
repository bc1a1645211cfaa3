"""Outputs: what a model returns, as torch.export and the comparison with the merged model need it.

A model may return any object: a dataclass, a cache of keys and values. Dataclasses are told to torch's pytree; an
object that pytree cannot open is left out of an exported model's output, and the report says so.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = (Tensor, int, float, complex, bool, str, type(None))


def foreign(value: Any) -> tuple[str, ...]:
    """The types of the objects in an output that pytree cannot open; dataclasses are registered on the way."""
    found: dict[str, None] = {}
    for leaf in tree_leaves(value):
        if isinstance(leaf, _PLAIN):
            continue
        if dataclasses.is_dataclass(leaf):
            torch.export.register_dataclass(type(leaf))
            found.update(dict.fromkeys(foreign(leaf)))
        else:
            found[type(leaf).__name__] = None
    return tuple(found)


def returned(value: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order, dataclasses opened: what models are compared by."""
    foreign(value)
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def plain(value: Any) -> Any:
    """An output with None for each object that pytree cannot open."""
    return tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else None, value)


def returning_plain(model: nn.Module) -> nn.Module:
    """Make this (private) copy of a model return `plain` outputs; its class, names and signature stay."""
    forward = model.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    model.forward = wrapped
    return model
