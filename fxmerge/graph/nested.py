"""Nested lists, tuples, dicts and slices of values: their leaves, and functions of those."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx


def tree(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with the function applied to each leaf of its lists, tuples, dicts and slices."""
    if type(value) in _LEAVES:  # nearly all; the questions below take longer than most functions
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(tree(function, v) for v in value))
    if isinstance(value, torch.Size):
        return tuple(tree(function, v) for v in value)
    if isinstance(value, (list, tuple)):
        return type(value)(tree(function, v) for v in value)
    if isinstance(value, dict):
        return {k: tree(function, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(tree(function, value.start), tree(function, value.stop), tree(function, value.step))
    return function(value)


_LEAVES = frozenset((fx.Node, Tensor, int, float, bool, str, type(None)))


def fresh(value: Any) -> Any:
    """Copies of all tensors in a call's arguments: a forward may update its input in place."""
    return tree(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def leaves(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples, dicts and slices, in order."""
    found: list[Any] = []
    tree(found.append, value)
    return found


def finite(value: Any) -> Any:
    """The same plain data with None for numbers that JSON does not have: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
