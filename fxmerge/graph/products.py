"""The precision of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_outside: ContextVar[str | None] = ContextVar(
    "outside", default=None
)  # torch's setting around a `products("bfloat16")`


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Of float32 matrices: "bfloat16" rounds the factors; "float32" is, also inside of it, what torch is set to."""
    outside = _outside.get()
    if (precision == "float32") == (outside is None):
        yield
        return
    before = torch.get_float32_matmul_precision()
    token = _outside.set(before if outside is None else None)
    torch.set_float32_matmul_precision("medium" if outside is None else outside)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        _outside.reset(token)
