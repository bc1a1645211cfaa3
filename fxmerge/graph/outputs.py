"""Opens the outputs of a model, for torch.export and for the comparison with the merged model.

A model may return any object, such as a dataclass or a key-value cache. Dataclasses are registered with torch's
pytree. An object that pytree cannot open is left out of an exported model's output, and the report names its type.
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
    """The types of the objects in an output that pytree cannot open. Registers the dataclasses that it finds."""
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
    """The real and complex tensors of an output, in order; dataclasses are opened. Models are compared by these."""
    foreign(value)
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and _has_fractions(leaf)]


def counting(value: Any) -> list[Tensor]:
    """The integer and boolean tensors of an output, in order: labels, places, masks."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not _has_fractions(leaf)]


def _has_fractions(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def agree(expected: list[Tensor], actual: list[Tensor], tolerance: float) -> bool:
    """Whether outputs have the same number, shapes and dtypes, and values that differ by rounding only.

    tolerance: the accepted difference of a tensor's entries, relative to the entry and to the largest entry; at least
        four times the precision of the dtype
    """

    def close(one: Tensor, other: Tensor) -> bool:
        accepted = max(tolerance, 4 * torch.finfo(one.dtype).eps)
        largest = float(one.abs().nan_to_num(0, 0, 0).max())
        return torch.allclose(one, other, accepted, accepted * largest + 1e-12, equal_nan=True)

    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in actual]:
        return False
    return all(close(one, other) for one, other in zip(expected, actual, strict=True) if one.numel())


def plain(value: Any) -> Any:
    """The output with each object that pytree cannot open replaced by None."""
    return tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else None, value)


def returning_plain(model: nn.Module) -> nn.Module:
    """Makes a model return `plain` outputs. Changes this copy in place; its class, names and signature stay."""
    forward = model.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    model.forward = wrapped
    return model
