"""The form of a rule, and the rules of ops that treat every channel alike and alone.

A rule is a function `rule(ctx, *args, **kwargs)` with the op's own functional signature. Operands arrive as `Lab`
(an activation's labels), `Param` (a parameter) or plain Python values and constant tensors. It returns what the op
gives in the same terms, and tells `ctx` what it learnt: `ctx.tie`, `ctx.pin`, `ctx.block`, `ctx.layer`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxmerge.graph import nested
from fxmerge.ir.labels import along, fixed, holds, rows, without
from fxmerge.ir.provenance import Lab, Param, View
from fxmerge.rules import binary, layers, movement
from fxmerge.rules.rule import Rule, Spelling


def per_channel_rule(ctx: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
    """Each channel is mapped by itself; axes that change size must not be the ones that labels vary along."""
    others = [*rest, *kwargs.values()]
    if ctx.rule_name == "identity" and any(isinstance(a, Param) for a in (x, *others)):
        return _converted(ctx, x, *rest, **kwargs)
    if not isinstance(x, Lab) or any(isinstance(a, (Lab, Param)) for a in others):
        return ctx.unknown("takes more than one activation or parameter here")
    shape = ctx.shape
    if shape is None:
        return ctx.unknown("gives something other than one tensor")
    if tuple(shape) == tuple(x.t.shape):
        return x
    if len(shape) != x.t.dim():
        return ctx.unknown("changes the number of axes")
    return ctx.resized(x, shape)


def _converted(ctx: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
    """A parameter in another dtype holds what it held; what takes the dtype of one takes no more of it."""
    x = x.value if isinstance(x, Param) and not x.value.is_floating_point() else x  # places, not values
    if isinstance(x, Param):
        return View(ctx.elements(x), x)
    if isinstance(x, Tensor):
        ctx.kind = "query"
        values = nested.tree(lambda v: v.value if isinstance(v, Param) else v, [list(rest), kwargs])
        return movement.run(ctx.target, (x, *values[0]), values[1])
    return x


def per_channel(name: str, *spellings: Spelling, commutes: bool | Callable[..., bool] = False) -> Rule:
    """A row for an op that treats every channel alike and alone: activations, pooling, dropout, ..."""
    return Rule(name, "per_channel", per_channel_rule, spellings, commutes)


def spatial_rule(ctx: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
    """Each channel by itself, but its places mixed: pooling, interpolation."""
    if isinstance(x, Lab):
        x = ctx.mixing(x)
    return ctx.unknown("mixes the channels") if x is None else per_channel_rule(ctx, x, *rest, **kwargs)


def spatial(name: str, *spellings: Spelling, commutes: bool = False) -> Rule:
    return Rule(name, "per_channel", spatial_rule, spellings, commutes)


def reduction_rule(ctx: Any, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """A reduction keeps the labels of the axes it leaves; over channels it is a mixer, whose result holds none.

    Over an axis that numbers blocks it adds them up, channel by channel: they are tied to each other.
    """
    if not isinstance(x, Lab):
        return ctx.unknown("reduces something that is no activation")
    if ctx.shape is None:
        return ctx.unknown("gives something other than one tensor")
    return _reduced(ctx, x, dim, keepdim, tuple(ctx.shape))


def _reduced(ctx: Any, x: Lab, dim: Any, keepdim: bool, shape: tuple[int, ...]) -> Any:
    axes = along(dim, x.t)
    held = movement.varying_axes(x)
    blocks = [axis for axis in held if axis not in axes]
    labels = x.t
    if axes & set(held) and held[-1] in axes:  # over what is inside of blocks, or over all channels
        ctx.mix(x.t)
        if not blocks or not ctx.whole:
            return Lab(fixed(shape))
        sizes = [s if axis in blocks else 1 for axis, s in enumerate(x.t.shape)]
        labels = ctx.numbered(sizes, [rows(x.t, blocks)]).expand(x.t.shape)
    elif axes & set(held):  # over blocks: what stands at one place of all of them is one channel
        labels = labels[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(labels.dim()))]
        ctx.tie(labels, x.t)
        labels = labels.expand(x.t.shape)
    out = without(labels, axes, keepdim)
    if tuple(out.shape) != shape:
        return ctx.unknown("gives something other than one tensor")
    return Lab(out)


Extreme = namedtuple("Extreme", ["values", "indices"])  # as torch.return_types.max has them


def extreme_rule(ctx: Any, x: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None, **kwargs: Any) -> Any:
    """max, min and median: of two activations, of all there is, or along an axis, and then the places too.

    Places along an axis of channels are numbers of channels, which change once some have gone: nobody may use them.
    """
    second = dim if other is None else other
    if isinstance(second, (Lab, Param, Tensor)):
        ctx.kind = "tie"
        return binary.elementwise(ctx, x, second, **kwargs)
    if dim is None or not isinstance(x, Lab):
        return reduction_rule(ctx, x, dim, keepdim, **kwargs)
    if along(dim, x.t) & set(movement.varying_axes(x)) and ctx.takes(1, "indices"):
        return ctx.unknown("gives the numbers of channels")
    values = _reduced(ctx, x, dim, keepdim, tuple(without(x.t, along(dim, x.t), keepdim).shape))
    return Extreme(values, values)


def extreme(name: str, *spellings: Spelling) -> Rule:
    """Its values scale with the channel, its places do not."""
    return Rule(name, "per_channel", extreme_rule, spellings, lambda ctx, *args, **kw: not ctx.takes(1, "indices"))


def reduction(name: str, *spellings: Spelling, commutes: bool = False) -> Rule:
    return Rule(name, "per_channel", reduction_rule, spellings, commutes)


def softmax_rule(ctx: Any, x: Any, dim: int | None = None, *rest: Any, **kwargs: Any) -> Any:
    """Softmax is per channel along any axis that labels do not vary along, and a mixer along one that they do."""
    if not isinstance(x, Lab) or dim is None:
        return ctx.unknown("does not say its axis")
    if dim % x.t.dim() in movement.varying_axes(x):
        ctx.mix(x.t)
    return x


def prelu_rule(ctx: Any, x: Any, weight: Any) -> Any:
    if isinstance(weight, Param) and weight.value.numel() > 1 and isinstance(x, Lab):
        return layers.carry(ctx, "prelu", x, {"weight": weight}, axis=min(1, x.t.dim() - 1))
    return x


def sampled_rule(ctx: Any, input: Any, *places: Any, **kwargs: Any) -> Any:
    """Values of a feature map at places that the model computes: each channel by itself (grid_sample, roi_align)."""
    given = (*places, *kwargs.values())
    for place in given:
        if isinstance(place, View):
            ctx.freeze(place.param, "says places, not channels")
    held = any(isinstance(p, Lab) and not isinstance(p, View) and holds(p.t) for p in given)
    if not isinstance(input, Lab) or ctx.shape is None or held:
        return ctx.unknown("takes places that hold channels")
    mixed = ctx.mixing(input)
    return ctx.unknown("mixes the channels") if mixed is None else ctx.resized(mixed, ctx.shape)


def adds_nothing(ctx: Any, *args: Any, **kwargs: Any) -> bool:
    """A sum commutes with scaling when every operand has a value of its own for each channel, which scales too."""
    for x, other in (args[:2], args[1::-1]):
        if isinstance(other, (int, float)) and other != 0:
            return False
        if isinstance(other, Tensor):
            return False
        if isinstance(x, Lab) and isinstance(other, (Lab, Param)):
            shape = other.t.shape if isinstance(other, Lab) else other.value.shape
            if movement.varying_axes(x) and not binary.meets(x.t, shape):
                return False
    return True


def one_factor(ctx: Any, *args: Any, **kwargs: Any) -> bool:
    """A product commutes with scaling when just one operand is an activation, and stands above the line."""
    labs = [isinstance(a, Lab) and not isinstance(a, View) for a in args[:2]]
    return labs == [True, False] or (labs == [False, True] and "div" not in ctx.rule_name)
