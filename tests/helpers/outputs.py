"""The tensors of a model's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def leaves(value: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, dict):
        return [t for v in value.values() for t in leaves(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in leaves(v)]
    return [value] if isinstance(value, Tensor) else []
