"""Rules of further ops on two or three operands that meet position by position: atan2, lerp, logical_and, ..."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from fxmerge.ir.provenance import Lab
from fxmerge.rules.binary import combined, elementwise, operand_shape
from fxmerge.rules.context import RuleContext
from fxmerge.rules.rule import Operand, Rule, Unknown

# the name of an op -> other names for it, and functions that compute it
_BINARY: dict[str, tuple[Any, ...]] = {
    "fmod": (),
    "remainder": (operator.mod, operator.imod),
    "floor_divide": (operator.floordiv, operator.ifloordiv),
    "atan2": ("arctan2",),
    "hypot": (),
    "copysign": (),
    "fmax": (),
    "fmin": (),
    "float_power": (),
    "ldexp": (),
    "xlogy": (torch.special.xlogy,),
    "logaddexp": (),
    "logaddexp2": (),
    "heaviside": (),
    "isclose": (),
    "logical_and": (),
    "logical_or": (),
    "logical_xor": (),
    "bitwise_and": (operator.and_, operator.iand),
    "bitwise_or": (operator.or_, operator.ior),
    "bitwise_xor": (operator.xor, operator.ixor),
}


def spellings(name: str, *more: Any) -> tuple[Any, ...]:
    """Every function and method of these names that torch has, then the functions in `more`."""
    names = [spelled for n in (name, *(m for m in more if isinstance(m, str))) for spelled in (n, n + "_")]
    functions = [getattr(torch, n) for n in names if hasattr(torch, n)]
    methods = [n for n in names if hasattr(Tensor, n)]
    return (*functions, *methods, *(m for m in more if not isinstance(m, str)))


def lerp(ctx: RuleContext, input: Operand, end: Operand, weight: Operand) -> Lab | Unknown:
    """input + weight * (end - input)."""
    sizes = operand_shape(input), operand_shape(end)
    if ctx.shape is None or sizes[0] is None or sizes[1] is None:
        return Unknown("gives something other than one tensor")
    between = tuple(torch.broadcast_shapes(*sizes))  # type: ignore[no-untyped-call]
    mixed = combined(ctx, input, end, "lerp", between)
    if isinstance(mixed, Unknown) or operand_shape(weight) is None:
        return mixed
    return combined(ctx, mixed, weight, "lerp", ctx.shape)


def addcdiv(
    ctx: RuleContext, input: Operand, tensor1: Operand, tensor2: Operand, *, value: Operand = 1
) -> Lab | Unknown:
    """input + value * tensor1 / tensor2."""
    sizes = operand_shape(tensor1), operand_shape(tensor2)
    if ctx.shape is None or sizes[0] is None or sizes[1] is None:
        return Unknown("gives something other than one tensor")
    between = tuple(torch.broadcast_shapes(*sizes))  # type: ignore[no-untyped-call]
    quotient = combined(ctx, tensor1, tensor2, "div", between)
    return quotient if isinstance(quotient, Unknown) else combined(ctx, input, quotient, "add", ctx.shape)


ROWS: tuple[Rule, ...] = (
    Rule("pow", "tie", elementwise, (*spellings("pow"), operator.pow, operator.ipow)),
    *(Rule(name, "tie", elementwise, spellings(name, *more)) for name, more in _BINARY.items()),
    Rule("lerp", "tie", lerp, spellings("lerp")),
    Rule("addcdiv", "tie", addcdiv, spellings("addcdiv")),
)
