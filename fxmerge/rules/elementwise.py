"""Rules of ops that map each channel by itself: activations, pooling, reductions, softmax."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Concatenate

from torch import Tensor, nn

from fxmerge.graph import nested
from fxmerge.ir.labels import along, fixed, holds, innermost, rows, varying, without
from fxmerge.ir.provenance import Lab, Param, View
from fxmerge.rules import binary, layers, movement
from fxmerge.rules.context import RuleContext, resized
from fxmerge.rules.rule import Answer, AsKind, Operand, Rule, Spelling, Unknown

Dims = int | list[int] | tuple[int, ...] | None


def per_channel_rule(ctx: RuleContext, x: Operand, *rest: Operand, **kwargs: Operand) -> Answer:
    """Each channel is mapped by itself. Labels must not vary along axes that change size."""
    if not isinstance(x, Lab) or any(isinstance(a, (Lab, Param)) for a in (*rest, *kwargs.values())):
        return Unknown("takes more than one activation or parameter here")
    if ctx.shape is None:
        return Unknown("gives something other than one tensor")
    if tuple(ctx.shape) == tuple(x.t.shape):
        return x
    if len(ctx.shape) != x.t.dim():
        return Unknown("changes the number of axes")
    return resized(x, ctx.shape)


def per_channel(
    name: str, *spellings: Spelling, commutes: bool | Callable[Concatenate[RuleContext, ...], bool] = False,
    linear: bool = False,
) -> Rule:  # fmt: skip
    """A row for an op that maps each channel by itself: activations, pooling, dropout, ..."""
    return Rule(name, "per_channel", per_channel_rule, spellings, commutes, linear)


def identity_rule(ctx: RuleContext, x: Operand, *rest: Operand, **kwargs: Operand) -> Answer:
    """The same values, perhaps as another dtype or on another device; those of a parameter keep its labels."""
    if not any(isinstance(a, Param) for a in (x, *rest, *kwargs.values())):
        return per_channel_rule(ctx, x, *rest, **kwargs)
    if isinstance(x, Param) and x.value.is_floating_point():
        return View(ctx.elements(x), x)
    x = x.value if isinstance(x, Param) else x  # a parameter of whole numbers holds places
    if isinstance(x, Tensor):
        values, named = nested.tree(lambda v: v.value if isinstance(v, Param) else v, [list(rest), kwargs])
        return AsKind("query", movement.run(ctx.target, (x, *values), named))
    return x  # only the dtype or device comes from the parameter


def spatial_rule(ctx: RuleContext, x: Operand, *rest: Operand, **kwargs: Operand) -> Answer:
    """Each channel by itself, but its places are mixed: pooling, interpolation."""
    if isinstance(x, Lab):
        mixed = ctx.mixing(x)
        return mixed if isinstance(mixed, Unknown) else per_channel_rule(ctx, mixed, *rest, **kwargs)
    return per_channel_rule(ctx, x, *rest, **kwargs)


def spatial(
    name: str, *spellings: Spelling, commutes: bool = False,
    linear: bool | Callable[Concatenate[RuleContext, ...], bool] = False,
) -> Rule:  # fmt: skip
    """A row for an op that mixes the places of each channel."""
    return Rule(name, "per_channel", spatial_rule, spellings, commutes, linear)


def reduction_rule(
    ctx: RuleContext, x: Operand, dim: Dims = None, keepdim: bool = False, **kwargs: Operand
) -> Lab | Unknown:
    """A reduction keeps the labels of the axes that it leaves; over channels it is a mixer, whose result holds none.

    Over an axis that numbers blocks it adds the blocks up, channel by channel: they are tied to each other.
    """
    if not isinstance(x, Lab):
        return Unknown("reduces something that is not an activation")
    if ctx.shape is None:
        return Unknown("gives something other than one tensor")
    return reduced(ctx, x, dim, keepdim, ctx.shape)


def reduced(ctx: RuleContext, x: Lab, dim: Dims, keepdim: bool, shape: tuple[int, ...]) -> Lab | Unknown:
    """The labels of a reduction over some axes, which gives that shape."""
    axes = along(dim, x.t)
    held = varying(x.t)
    blocks = [axis for axis in held if axis not in axes]
    labels = x.t
    inside = bool(held) and held[-1] in axes and innermost(x.t) in axes
    if inside:  # over the channels inside blocks, or over all channels
        ctx.mix(x.t)
        ctx.hold_places(x.t, blocks, single=True)
        if not blocks or not ctx.whole:
            return Lab(fixed(shape))
        sizes = [s if axis in blocks else 1 for axis, s in enumerate(x.t.shape)]
        labels = ctx.numbered(sizes, [rows(x.t, blocks)]).expand(x.t.shape)
    elif axes & set(held):  # over blocks: the labels at one place of all blocks are one channel
        labels = labels[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(labels.dim()))]
        ctx.tie(labels, x.t)
        labels = labels.expand(x.t.shape)
    out = without(labels, axes, keepdim)
    if tuple(out.shape) != tuple(shape):
        return Unknown("gives something other than one tensor")
    return Lab(out)


def reduction(name: str, *spellings: Spelling, commutes: bool = False, linear: bool = False) -> Rule:
    """A row for a reduction."""
    return Rule(name, "per_channel", reduction_rule, spellings, commutes, linear)


Extreme = namedtuple("Extreme", ["values", "indices"])  # as torch.return_types.max has them


def extreme_rule(
    ctx: RuleContext, x: Operand, dim: Operand = None, keepdim: bool = False, *, other: Operand = None,
    **kwargs: Operand,
) -> Answer:  # fmt: skip
    """max, min and median: of two activations, of all entries, or along an axis, where they return the places too.

    Places along an axis of channels are numbers of channels. They change where channels are dropped, so the graph must
    not use them.
    """
    second = dim if other is None else other
    if isinstance(second, (Lab, Param, Tensor)):
        return AsKind("tie", binary.elementwise(ctx, x, second, **kwargs))
    if dim is None or not isinstance(x, Lab):
        return reduction_rule(ctx, x, None, keepdim, **kwargs)
    if not isinstance(dim, (int, list, tuple)):
        return Unknown("does not say its axis")
    if along(dim, x.t) & set(varying(x.t)) and ctx.uses(1, "indices"):
        return Unknown("gives the numbers of channels")
    values = reduced(ctx, x, dim, keepdim, tuple(without(x.t, along(dim, x.t), keepdim).shape))
    return values if isinstance(values, Unknown) else Extreme(values, values)


def extreme(name: str, *spellings: Spelling) -> Rule:
    """A row for max, min or median. Its values scale with the channel, its places do not."""
    return Rule(name, "per_channel", extreme_rule, spellings, lambda ctx, *args, **kw: not ctx.uses(1, "indices"))


def softmax_rule(
    ctx: RuleContext, x: Operand, dim: int | None = None, *rest: Operand, **kwargs: Operand
) -> Lab | Unknown:
    """Softmax is a mixer along an axis that labels vary along, and per channel along any other."""
    if not isinstance(x, Lab) or dim is None:
        return Unknown("does not say its axis")
    if dim % x.t.dim() in varying(x.t):
        ctx.mix(x.t, {dim % x.t.dim()})
    return x


def prelu_rule(ctx: RuleContext, x: Operand, weight: Operand) -> Answer:
    """max(x, 0) + weight * min(x, 0), with one weight for all channels or one for each (axis 1)."""
    if isinstance(weight, Param) and weight.value.numel() > 1 and isinstance(x, Lab):
        return layers.carry(ctx, "prelu", x, {"weight": weight}, axis=min(1, x.t.dim() - 1))
    return x


def sampled_rule(ctx: RuleContext, input: Operand, *places: Operand, **kwargs: Operand) -> Lab | Unknown:
    """Values of a feature map at places that the model computes: each channel by itself (grid_sample, roi_align)."""
    given = (*places, *kwargs.values())
    for place in given:
        if isinstance(place, View):
            ctx.freeze(place.param, "holds places, not channels")
    held = any(isinstance(p, Lab) and not isinstance(p, View) and holds(p.t) for p in given)
    if not isinstance(input, Lab) or ctx.shape is None or held:
        return Unknown("takes places that hold channels")
    mixed = ctx.mixing(input)
    return mixed if isinstance(mixed, Unknown) else resized(mixed, ctx.shape)


def adds_nothing(ctx: RuleContext, *args: Operand, **kwargs: Operand) -> bool:
    """A sum commutes with scaling if every operand has a value of its own for each channel, which scales too."""
    for x, other in (args[:2], args[1::-1]):
        if isinstance(other, (int, float)) and other != 0:
            return False
        if isinstance(other, Tensor):
            return False
        if isinstance(x, Lab) and isinstance(other, (Lab, Param)):
            shape = other.t.shape if isinstance(other, Lab) else other.value.shape
            if varying(x.t) and not binary.meets(x.t, shape):
                return False
    return True


def one_factor(ctx: RuleContext, *args: Operand, **kwargs: Operand) -> bool:
    """A product commutes with scaling if exactly one operand is an activation; a quotient if it is the numerator."""
    labs = [isinstance(a, Lab) and not isinstance(a, View) for a in args[:2]]
    return labs == [True, False] or (labs == [False, True] and ctx.rule_name != "div")


def averages(ctx: RuleContext, *args: Operand, **kwargs: Operand) -> bool:
    """Of the pools in one row, those that average are linear."""
    name = type(ctx.target).__name__ if isinstance(ctx.target, nn.Module) else ctx.called
    return "avg" in name.lower()


def by_numerator(ctx: RuleContext, input: Operand, other: Operand, **kwargs: Operand) -> bool:
    """A quotient is linear in its numerator, unless it is rounded."""
    return kwargs.get("rounding_mode") is None and not (isinstance(other, Lab) and holds(other.t))


def fills_with_zero(ctx: RuleContext, input: Operand, mask: Operand, value: Operand) -> bool:
    """A mask that sets entries to zero is linear."""
    return isinstance(value, (int, float)) and value == 0
