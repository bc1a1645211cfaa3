"""Rules of ops that write to places given by an index, or read from them: setitem, scatter, index_copy, take_along_dim.

The values that are written and the tensor that they are written to are tied along the axes of their channels. Along
the axis that an index runs over, labels must not vary. An index with an entry of its own for each channel (expanded
over them) must follow their number.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from fxmerge.graph.ops import Aten
from fxmerge.ir.labels import fixed, holds, simplify, varying
from fxmerge.ir.provenance import Lab, Param, View
from fxmerge.rules import movement
from fxmerge.rules.binary import combined, meets, operand_shape
from fxmerge.rules.context import RuleContext, resized
from fxmerge.rules.pointwise import spellings
from fxmerge.rules.rule import Answer, AsKind, Operand, Rule, Unknown

_NOTHING = "writes nothing for these example inputs; give inputs for which it does"
_OVER_CHANNELS = "runs over the axis of the channels"


def _labels(ctx: RuleContext, operand: Operand) -> Tensor | None:
    """The labels of a tensor that is written or read; a raw parameter has one for each element. None for a number."""
    if isinstance(operand, (Param, View)):
        raw = operand.param if isinstance(operand, View) else operand
        ctx.layer("joined", {"weight": raw}, carries=ctx.elements(raw))
        return operand.t if isinstance(operand, View) else ctx.elements(raw)
    if isinstance(operand, Lab):
        return operand.t
    return fixed(operand.shape) if isinstance(operand, Tensor) else None


def _match(ctx: RuleContext, place: Tensor, whole: Operand, labels: Tensor, value: Operand) -> Unknown | None:
    """Tie the labels of values to those of the places where they are written, to which they are broadcast."""
    if labels.dim() > place.dim():
        return Unknown("writes something that has more axes than its place")
    labels = labels.reshape([1] * (place.dim() - labels.dim()) + list(labels.shape))
    for one, other, constant in ((place, labels, value), (labels, place, whole)):
        if not holds(other) and meets(one, other.shape):
            ctx.want(constant, one)
            return Unknown("brings channels together with a constant tensor")
    if not holds(labels):
        return None  # one value for all channels
    if any(labels.size(axis) == 1 for axis in varying(place)) or not holds(place):
        return Unknown("spreads channels over the places of others")
    ctx.tie(place, labels)
    return None


def setitem(ctx: RuleContext, x: Operand, index: Operand, value: Operand) -> Answer:
    """x[index] = value: what is written is tied to the channels of x at the same places.

    A literal index along the axis of the channels is corrected after a merge as that of `x[index]` is.
    """
    whole = _labels(ctx, x) if isinstance(x, (Lab, Tensor)) and not isinstance(x, View) else None
    if whole is None:
        return Unknown("writes to a parameter")
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    number = not operand_shape(value) and not (
        isinstance(value, Lab) and not isinstance(value, View) and holds(value.t)
    )
    if number:
        ctx.freeze(value.param if isinstance(value, View) else value, "is one number for all channels")
    given = [at for at, item in enumerate(items) if operand_shape(item) is not None]
    first = items[given[0]] if given else None
    if number and len(items) == 1 and isinstance(first, Lab) and first.t.dim() == whole.dim() > 1:
        if 0 in varying(whole) or not isinstance(x, Lab):
            return Unknown(_OVER_CHANNELS)
        return combined(ctx, x, first, "masked_fill", tuple(whole.shape))
    if len(given) > 1 or (isinstance(first, Lab) and holds(first.t)) or len(operand_shape(first) or ()) > 1:
        return Unknown("writes to places that hold channels, or that several indices give")
    plain: list[Any] = [slice(0, 1) if at in given else item for at, item in enumerate(items)]
    if given and not operand_shape(first):
        plain[given[0]] = 0
    if not all(item is None or item is ... or isinstance(item, (int, slice)) for item in plain):
        return Unknown("writes to places that are computed")
    indexed = _axis_of(whole, plain, given[0]) if given else None
    if indexed is not None and indexed in varying(whole):
        return Unknown(_OVER_CHANNELS)
    answer = Lab(whole) if isinstance(x, Lab) else x
    labels = None if number else _labels(ctx, value)
    if labels is None:
        return answer if isinstance(x, Lab) else Unknown("writes to a constant tensor")
    place = whole[tuple(plain)]
    if given and operand_shape(first):  # along the axis of the index, one entry stands for all
        axis = labels.dim() - place.dim() + _kept_before(whole, plain, given[0])
        if axis >= 0:
            if not labels.size(axis):
                return Unknown(_NOTHING)
            if axis in varying(labels):
                return Unknown(_OVER_CHANNELS)
            labels = labels.narrow(axis, 0, 1)
    wrong = _match(ctx, place, x, labels, value)
    return answer if wrong is None else wrong


def _axis_of(whole: Tensor, items: list[Any], at: int) -> int:
    """The axis of the whole tensor that one item of an index runs over."""
    if ... in items[:at]:
        return whole.dim() - sum(item is not None for item in items[at:])
    return sum(item is not None for item in items[:at])


def _kept_before(whole: Tensor, items: list[Any], at: int) -> int:
    """How many axes of x[items] come before that of one item."""
    axis = _axis_of(whole, items, at)
    ints = sum(isinstance(item, int) for item in items[:at])
    return axis - ints + sum(item is None for item in items[:at])


def index_put(ctx: RuleContext, input: Operand, indices: Operand, values: Operand, accumulate: bool = False) -> Answer:
    """x[indices] = values, where an index None takes all of its axis."""
    if not isinstance(indices, (tuple, list)):
        return Unknown("is called without a list of indices")
    return setitem(ctx, input, tuple(slice(None) if i is None else i for i in indices), values)


def copy(ctx: RuleContext, input: Operand, src: Operand, non_blocking: bool = False) -> Answer:
    """All values of a tensor, often a view of another, are replaced."""
    return setitem(ctx, input, ..., src)


def slice_scatter(
    ctx: RuleContext, input: Operand, src: Operand, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Answer:  # fmt: skip
    """A copy of x in which x[..., start:end] = src along an axis without channels."""
    shape = operand_shape(input)
    if not isinstance(input, Lab) or shape is None or dim % len(shape) in varying(input.t):
        return Unknown(_OVER_CHANNELS)
    return setitem(ctx, input, (*[slice(None)] * (dim % len(shape)), slice(start, end, step)), src)


def select_scatter(ctx: RuleContext, input: Operand, src: Operand, dim: int, index: int) -> Answer:
    """A copy of x in which x[..., index] = src along an axis without channels."""
    shape = operand_shape(input)
    if not isinstance(input, Lab) or shape is None or dim % len(shape) in varying(input.t):
        return Unknown(_OVER_CHANNELS)
    return setitem(ctx, input, (*[slice(None)] * (dim % len(shape)), index), src)


def _follows(ctx: RuleContext, input: Lab, index: Operand, axis: int) -> Unknown | None:
    """An index with an entry for each channel: all of them, so that it can lose the same ones."""
    shape = operand_shape(index)
    if shape is None or len(shape) != input.t.dim():
        return Unknown("has an index of another form than the input")
    if any(shape[a] != input.t.size(a) for a in varying(input.t)):
        return Unknown("takes only some of the channels")
    if isinstance(index, View) and not index.param.value.is_floating_point():
        ctx.freeze(index.param, "holds places, not channels")
        ctx.want(index, input.t)
        return Unknown("has an index that does not follow the channels")
    if isinstance(index, Param):
        elements = ctx.elements(index)
        ctx.layer("table", {"weight": index}, carries=elements)
        here = [a for a in range(len(shape)) if a not in varying(input.t) and shape[a] > 1]
        ctx.tie(input.t[tuple(slice(0, 1) if a in here else slice(None) for a in range(len(shape)))], elements)
    elif isinstance(index, Lab) and holds(index.t):
        if axis in varying(index.t):
            return Unknown("has an index that holds channels")
        ctx.tie(_along(input.t, axis), _along(index.t, axis))
    elif varying(input.t):
        ctx.want(index, input.t)
        return Unknown("has an index that does not follow the channels")
    return None


def _along(labels: Tensor, axis: int) -> Tensor:
    return labels.narrow(axis, 0, 1)


def scatter(
    ctx: RuleContext, input: Operand, dim: int, index: Operand, src: Operand = None, reduce: Operand = None, *,
    value: Operand = None, **kwargs: Operand,
) -> Answer:  # fmt: skip
    """scatter, scatter_add, scatter_reduce: entries go to places along an axis that index gives, channel by channel."""
    source = value if src is None else src
    labels = source.t if isinstance(source, Lab) else None
    if not isinstance(input, Lab):
        if labels is not None and isinstance(input, Tensor):
            ctx.want(input, labels)
        return Unknown("writes to a constant tensor")
    axis = dim % input.t.dim()
    if labels is not None and (labels.dim() != input.t.dim() or axis in varying(labels)):
        return Unknown(_OVER_CHANNELS)
    if axis in varying(input.t):
        return Unknown(_OVER_CHANNELS)
    if labels is not None and not varying(input.t) and varying(labels):
        ctx.want(input, labels)
        return Unknown("writes channels to a constant tensor")
    wrong = _follows(ctx, input, index, axis)
    if wrong is not None or operand_shape(source) is None:
        return input if wrong is None else wrong
    if labels is None or labels.size(axis) == 0:
        return Unknown("writes something that is not an activation")
    if any(labels.size(a) != input.t.size(a) for a in varying(input.t)):
        return Unknown("takes only some of the channels")
    wrong = _match(ctx, _along(input.t, axis), input, simplify(_first(labels, input.t)), source)
    return input if wrong is None else wrong


def _first(labels: Tensor, like: Tensor) -> Tensor:
    """The labels taken once along axes that those of `like` do not vary along."""
    return labels[tuple(slice(None) if a in varying(like) else slice(0, 1) for a in range(labels.dim()))]


def index_copy(
    ctx: RuleContext, input: Operand, dim: int, index: Operand, source: Operand, *rest: Operand, **kwargs: Operand
) -> Answer:
    """Entries of the source are written, or added, along an axis that labels do not vary along."""
    if not isinstance(source, Lab) or (isinstance(index, Lab) and holds(index.t)):
        return Unknown("takes operands other than activations, or indices that hold channels")
    axis = dim % source.t.dim()
    if not source.t.size(axis):
        return Unknown(_NOTHING)
    if axis in varying(source.t):
        return Unknown(_OVER_CHANNELS)
    if not isinstance(input, Lab) or (not holds(input.t) and varying(source.t)):
        ctx.want(input, source.t)
        return Unknown("writes channels to a constant tensor")
    if axis in varying(input.t):
        return Unknown(_OVER_CHANNELS)
    wrong = _match(ctx, _along(input.t, axis), input, _along(source.t, axis), source)
    return input if wrong is None else wrong


def index_fill(ctx: RuleContext, input: Operand, dim: int, index: Operand, value: Operand) -> Answer:
    """One number is written to entries along an axis that labels do not vary along."""
    shape = operand_shape(value)
    if not isinstance(input, Lab) or dim % input.t.dim() in varying(input.t) or (shape is not None and len(shape)):
        return Unknown(_OVER_CHANNELS)
    if isinstance(index, Lab) and holds(index.t):
        return Unknown("takes indices that hold channels")
    return input


def gather(ctx: RuleContext, input: Operand, dim: int, index: Operand, *rest: Operand, **kwargs: Operand) -> Answer:
    """Entries along an axis that an index gives: channel by channel where the input holds channels."""
    if not isinstance(input, Lab) or isinstance(input, View) or not varying(input.t) or ctx.shape is None:
        return AsKind("movement", movement.execute(ctx, input, dim, index, *rest, **kwargs))
    axis = dim % input.t.dim()
    if axis in varying(input.t):
        return Unknown(_OVER_CHANNELS)
    wrong = _follows(ctx, input, index, axis)
    return resized(input, ctx.shape) if wrong is None else wrong


def take_along_dim(ctx: RuleContext, input: Operand, indices: Operand, dim: int | None = None) -> Answer:
    """As gather, but an index of size 1 serves all channels."""
    if not isinstance(input, Lab) or dim is None or ctx.shape is None:
        return Unknown("does not say its axis")
    shape = operand_shape(indices)
    axis = dim % input.t.dim()
    if axis in varying(input.t) or (isinstance(indices, Lab) and axis in varying(indices.t)):
        return Unknown(_OVER_CHANNELS)
    if shape is not None and not meets(input.t, shape):
        return resized(input, ctx.shape)
    wrong = _follows(ctx, input, indices, axis)
    return resized(input, ctx.shape) if wrong is None else wrong


def fill(ctx: RuleContext, input: Operand, value: Operand = 0) -> Answer:
    """One number everywhere, often in a view of another tensor."""
    shape = operand_shape(value)
    if not isinstance(input, Lab) or isinstance(input, View) or (isinstance(value, Lab) and holds(value.t)):
        return Unknown("writes to a constant tensor or a parameter, or writes a channel")
    return Unknown("writes a tensor") if shape else input


ROWS: tuple[Rule, ...] = (
    Rule("setitem", "tie", setitem, (operator.setitem, "__setitem__")),
    Rule("index_put", "tie", index_put, spellings("index_put")),
    Rule("copy", "tie", copy, ("copy_", Aten("copy"))),
    Rule("slice_scatter", "tie", slice_scatter, spellings("slice_scatter")),
    Rule("select_scatter", "tie", select_scatter, spellings("select_scatter")),
    Rule("scatter", "tie", scatter, spellings("scatter", "scatter_add", "scatter_reduce")),
    Rule("index_copy", "tie", index_copy, (*spellings("index_copy", "index_add", "index_reduce"),)),
    Rule("index_fill", "tie", index_fill, spellings("index_fill")),
    Rule("gather", "per_channel", gather, spellings("gather"), True),
    Rule("take_along_dim", "per_channel", take_along_dim, spellings("take_along_dim"), True),
    Rule("fill", "per_channel", fill, spellings("fill")),
    Rule("zero", "per_channel", fill, ("zero_",), True),
)
