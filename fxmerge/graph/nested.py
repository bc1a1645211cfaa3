"""Functions of nested values: the leaves of lists, tuples, dicts and slices, such as the arguments of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

_LEAF_TYPES = frozenset((fx.Node, Tensor, int, float, bool, str, type(None)))


def tree(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to each leaf of nested lists, tuples, dicts and slices; the structure stays."""
    if type(value) in _LEAF_TYPES:  # the common case: the checks below take longer than most functions
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind: Any = type(value)
        return kind._make(tree(function, v) for v in value)  # a PackedSequence has a constructor of its own
    if isinstance(value, torch.Size):
        return tuple(tree(function, v) for v in value)
    if isinstance(value, (list, tuple)):
        return type(value)(tree(function, v) for v in value)
    if isinstance(value, dict):
        return {k: tree(function, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(tree(function, value.start), tree(function, value.stop), tree(function, value.step))
    return function(value)


def fresh(value: Any) -> Any:
    """The arguments of a call with every tensor cloned, since a forward may update its inputs in place."""
    return tree(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def leaves(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples, dicts and slices, in order."""
    found: list[Any] = []
    tree(found.append, value)
    return found


def holds_tensors(value: Any) -> bool:
    """Whether a value is no tensor, but a tuple, list or dict with tensors in it."""
    return not isinstance(value, Tensor) and any(isinstance(leaf, Tensor) for leaf in leaves(value))


def finite(value: Any) -> Any:
    """Plain data with NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
