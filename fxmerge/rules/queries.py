"""Rules of ops that give plain values: shapes, dtypes, devices, new constants."""

from __future__ import annotations

import torch

from fxmerge.graph import nested
from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules import movement
from fxmerge.rules.context import RuleContext
from fxmerge.rules.rule import Answer, AsKind, Operand, Unknown

TRANSPOSES = ("T", "mT", "H", "mH")  # attributes that are movements
_VALUES = ("real", "imag", "data")  # attributes that map each entry by itself, and pass a factor
_ATTRIBUTES = ("shape", "ndim", "is_cuda", "requires_grad", "itemsize", "layout")  # the same for labels


def query_rule(ctx: RuleContext, x: Operand, *args: Operand, **kwargs: Operand) -> Answer:
    """A shape, dtype or device. Shapes are read off the labels, dtypes and devices off the example run."""
    if moves(ctx, x, *args):
        several = hasattr(x, "_fields")
        return AsKind("movement", getattr(x, str(args[0])) if several else movement.execute(ctx, x, *args))
    if ctx.target is getattr and isinstance(x, Lab):
        return _attribute(ctx, x, str(args[0]))
    plain = x.t if isinstance(x, Lab) else x.value if isinstance(x, Param) else x
    return movement.run(ctx.target, (plain, *args), kwargs)


def _attribute(ctx: RuleContext, x: Lab, name: str) -> Answer:
    if name in ("dtype", "device"):
        found = ctx.example(name)
        return Unknown(f"asks for .{name}") if found is None else found
    if name in _VALUES:
        return AsKind("per_channel", x)
    return getattr(x.t, name) if name in _ATTRIBUTES else Unknown(f"asks for .{name}")


def moves(ctx: RuleContext, x: Operand, *args: Operand, **kwargs: Operand) -> bool:
    """Is the call a movement of the whole tensor, as `x.T` is, or the choice of one of several values?"""
    return ctx.target is getattr and (args[0] in TRANSPOSES or hasattr(x, "_fields"))


def passes_factor(ctx: RuleContext, x: Operand, *args: Operand, **kwargs: Operand) -> bool:
    """Is a factor of the tensor a factor of what the call gives?"""
    return moves(ctx, x, *args) or (ctx.target is getattr and args[0] in _VALUES)


def constant_rule(ctx: RuleContext, x: Operand, *args: Operand, **kwargs: Operand) -> Answer:
    """A new constant of a given size, which takes only its dtype and device from an activation."""
    if any(isinstance(leaf, (Lab, Param)) for leaf in nested.leaves([*args, *kwargs.values()])):
        return Unknown("is filled with something that depends on the input")
    return movement.run(ctx.target, (torch.empty(()), *args), {k: v for k, v in kwargs.items() if k != "device"})


def type_as_rule(ctx: RuleContext, x: Operand, other: Operand) -> Answer:
    """The same values; only the dtype comes from the other operand."""
    return x
