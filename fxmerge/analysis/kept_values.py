"""Values of a graph's nodes before and after a merge: what is left of them, and whether two of them are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmerge.graph import nested
from fxmerge.ir.labels import compact, thin
from fxmerge.ir.provenance import Lab, Param, ParamLabels, Provenance

ANY = -1  # padded zeros, which are all alike


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an activation or parameter; None for another value."""
    if isinstance(value, Lab):
        return tuple(value.t.shape)
    return tuple(value.value.shape) if isinstance(value, Param) else None


def labelled(value: Any) -> bool:
    """Is there an activation among nested values?"""
    return any(isinstance(leaf, Lab) for leaf in nested.leaves(value))


def plain(
    args: tuple[Any, ...], kwargs: dict[str, Any], facts: Provenance | None = None, alive: Tensor | None = None,
    indexing: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Arguments as plain tensors: activations as their labels, parameters as they are or as the labels that stay."""

    def given(value: Any) -> Any:
        if isinstance(value, Lab):
            return value.t
        if isinstance(value, Param) and facts is not None and alive is not None:
            known = facts.params.get(value.path)
            if known is not None and known.elements is not None:
                return (compact(known.elements, alive) or [known.elements])[0]
        if isinstance(value, Param):
            return value.value
        if isinstance(value, Tensor) and facts is not None and not indexing:
            return torch.zeros(value.shape, dtype=torch.int64)
        return value

    return nested.tree(given, args), nested.tree(given, kwargs)


def equal(found: Tensor, want: Tensor) -> bool:
    """Are these the labels that are wanted? Places of ANY may hold any label."""
    if found.shape != want.shape:
        return False
    found, want = thin(found), thin(want)
    return bool(((found == want) | (found == ANY)).all())


def unchanged(before: Any, after: Any) -> bool:
    """Is a value the same object as before, or an equal plain value?"""
    if before is after:
        return True
    one, other = nested.leaves(before), nested.leaves(after)
    return len(one) == len(other) and all(
        a.t is b.t
        if isinstance(a, Lab) and isinstance(b, Lab)
        else type(a) in _SIMPLE and type(b) in _SIMPLE and a == b
        for a, b in zip(one, other, strict=True)
    )


_SIMPLE = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device)


def same(found: Any, want: Any) -> bool:
    """Are these the labels and plain values that are wanted?"""
    if found is None:
        return False
    one, other = nested.leaves(found), nested.leaves(want)
    return len(one) == len(other) and all(
        equal(a.t, b.t) if isinstance(a, Lab) and isinstance(b, Lab) else a == b
        for a, b in zip(one, other, strict=True)
    )


def labels_of(known: ParamLabels) -> list[Tensor]:
    """The label tensors of a parameter."""
    return [*known.axes.values(), *([] if known.elements is None else [known.elements])]


def narrows(value: Any, facts: Provenance, alive: Tensor) -> bool:
    """Is this a parameter that loses elements?"""
    known = facts.params.get(value.path) if isinstance(value, Param) else None
    return known is not None and not all(bool(alive[t].all()) for t in labels_of(known))


def narrowed(value: Any, facts: Provenance, alive: Tensor) -> Any:
    """A parameter, of the shape that it will have; its values are not those that stay. Other values are unchanged."""
    if not narrows(value, facts, alive):
        return value
    known = facts.params[value.path]
    if known.elements is not None:
        shape = list((compact(known.elements, alive) or [known.elements])[0].shape)
    else:
        shape = list(value.value.shape)
        for axis, labels in known.axes.items():
            stays = alive[labels]
            rows = int(stays.view(known.groups, -1).any(1).sum()) if known.groups > 1 and axis == 1 else 1
            rows = len(labels) if labels.dim() > 1 else rows
            shape[axis] = int(stays.sum()) // rows
    return Param(value.path, value.value.new_empty(()).expand(shape))
