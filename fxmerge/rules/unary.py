"""Rows of functions of one number: round, log1p, isnan, ... They map each entry of an activation by itself."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules.binary import combined
from fxmerge.rules.context import RuleContext
from fxmerge.rules.elementwise import per_channel, per_channel_rule
from fxmerge.rules.rule import Answer, AsKind, Operand, Rule, Spelling, Unknown


def unary(name: str, *more: Spelling, commutes: bool = False, linear: bool = False) -> Rule:
    """A row for a function of one number, in all spellings that torch has.

    more: other names for it (strings that torch has too, as "arcsin" for "asin"), and further functions and modules
    """
    names = [name, *(m for m in more if isinstance(m, str))]
    found: list[Any] = []
    for each in (spelled for n in names for spelled in (n, n + "_")):
        found += [getattr(torch, each)] if hasattr(torch, each) else []
        found += [each] if callable(getattr(Tensor, each, None)) else []
    found += [getattr(torch.special, n) for n in (*names, *_SPECIAL.get(name, ())) if hasattr(torch.special, n)]
    functions = (m for m in more if not isinstance(m, str))
    return per_channel(name, *dict.fromkeys([*found, *functions]), commutes=commutes, linear=linear)


_SPECIAL = {"sigmoid": ("expit",), "lgamma": ("gammaln",), "digamma": ("psi",)}  # names in torch.special


def clamp(ctx: RuleContext, input: Operand, min: Operand = None, max: Operand = None) -> Answer:
    """min and max are numbers, or tensors whose channels are tied to the input's."""
    bounds = [(b, name) for b, name in ((min, "maximum"), (max, "minimum")) if isinstance(b, (Lab, Param, Tensor))]
    if not bounds:
        return per_channel_rule(ctx, input)
    if ctx.shape is None:
        return Unknown("gives something other than one tensor")
    found: Lab | Unknown | Operand = input
    for bound, name in bounds:
        found = combined(ctx, found, bound, name, ctx.shape)
        if isinstance(found, Unknown):
            return found
    return AsKind("tie", found)


def clamp_min(ctx: RuleContext, input: Operand, min: Operand) -> Answer:
    """The larger of an activation and a bound."""
    return clamp(ctx, input, min)


def clamp_max(ctx: RuleContext, input: Operand, max: Operand) -> Answer:
    """The smaller of an activation and a bound."""
    return clamp(ctx, input, None, max)


def quantize_by_tensor(ctx: RuleContext, input: Operand, scale: Operand, zero_point: Operand, *rest: int) -> Answer:
    """Rounded to a grid that is the same for all channels."""
    for given in (scale, zero_point):
        ctx.freeze(given, "is the same for all channels")
        if isinstance(given, Lab) and given.t.numel() > 1:
            return Unknown("has a grid that is computed for each channel")
    return per_channel_rule(ctx, input)


def keeps_zero(ctx: RuleContext, input: Operand, nan: float | None = 0.0, *rest: Operand, **kwargs: Operand) -> bool:
    """nan_to_num passes a factor if NaN becomes 0."""
    return not nan


# functions without f(s x) = s f(x), in torch and torch.special
_OTHERS = [
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "square", "sin", "cos",
    "tan", "sinh", "cosh", "sinc", "erf", "erfc", "erfinv", "lgamma", "digamma", "i0", "logit", "round", "floor",
    "ceil", "frac", "sign", "sgn", "signbit", "isnan", "isinf", "isfinite", "isposinf", "isneginf", "angle",
    "logical_not",
]  # fmt: skip
_ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh",
    "trunc": "fix",
}  # fmt: skip
ROWS: tuple[Rule, ...] = (
    # f(s x) = s f(x) for s > 0
    unary("abs", "absolute", operator.abs, commutes=True),
    unary("neg", "negative", operator.neg, commutes=True, linear=True),
    unary("positive", operator.pos, commutes=True, linear=True),
    unary("deg2rad", commutes=True),
    unary("rad2deg", commutes=True),
    unary("real", commutes=True),
    unary("imag", commutes=True),
    unary("conj", "conj_physical", "resolve_conj", commutes=True),
    Rule("nan_to_num", "per_channel", per_channel_rule,
         (torch.nan_to_num, torch.nan_to_num_, "nan_to_num", "nan_to_num_"), keeps_zero),
    # functions for which this does not hold
    unary("sigmoid", nn.Sigmoid, F.sigmoid),
    unary("tanh", nn.Tanh, F.tanh),
    *(unary(name) for name in _OTHERS),
    *(unary(name, other) for name, other in _ALIASES.items()),
    unary("bitwise_not", operator.invert),
    Rule("clamp", "per_channel", clamp,
         (torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clamp_", "clip", "clip_")),
    Rule("clamp_min", "per_channel", clamp_min,
         (torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_")),
    Rule("clamp_max", "per_channel", clamp_max,
         (torch.clamp_max, torch.clamp_max_, "clamp_max", "clamp_max_")),
    Rule("fake_quantize_per_tensor", "per_channel", quantize_by_tensor, (torch.fake_quantize_per_tensor_affine,)),
)  # fmt: skip
