"""Rules of ops that give plain values: shapes, dtypes, devices, new constants."""

from __future__ import annotations

from typing import Any

import torch

from fxmerge.graph import nested
from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules import movement


def constant_rule(ctx: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A new constant of a given size that borrows only its dtype and device from an activation."""
    if any(isinstance(leaf, (Lab, Param)) for leaf in nested.leaves([*args, *kwargs.values()])):
        return ctx.unknown("is filled with something that depends on the input")
    return movement.run(ctx.target, (torch.empty(()), *args), {k: v for k, v in kwargs.items() if k != "device"})


def type_as_rule(ctx: Any, x: Any, other: Any) -> Any:
    """Only the dtype comes from the other operand."""
    return x


def query_rule(ctx: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Shapes, dtypes and devices: plain values, read off the operand."""
    return ctx.query(x, *args, **kwargs)


def moves(ctx: Any, x: Any, *args: Any, **kwargs: Any) -> bool:
    """x.T, unlike the other queries, is a movement of the whole tensor."""
    return bool(ctx.kind == "movement")
