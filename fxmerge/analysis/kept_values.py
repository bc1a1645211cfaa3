"""Values of a graph before and after some labels are dropped: are they equal, are they the same?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmerge.graph import nested
from fxmerge.ir.labels import thin
from fxmerge.ir.provenance import Lab

ANY = -1  # in place of a label: padded zeros and constants, which are all alike


def equal(found: Tensor, want: Tensor) -> bool:
    """Are these the labels that are wanted, in their places?"""
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
    """Are these nested values of equal labels and equal plain values?"""
    if found is None:
        return False
    one, other = nested.leaves(found), nested.leaves(want)
    return len(one) == len(other) and all(
        equal(a.t, b.t) if isinstance(a, Lab) and isinstance(b, Lab) else a == b
        for a, b in zip(one, other, strict=True)
    )
