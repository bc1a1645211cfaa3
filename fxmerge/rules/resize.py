"""New literal sizes for calls whose operands have lost channels.

PROPOSALS are for movement ops. A proposal is a guess, which `analysis/literal_sizes.py` proves by running it on the
labels that are kept. IMPLICIT is for ops whose result depends on a width that the call may not even name: the scale of
scaled_dot_product_attention, the `normalized_shape` of layer_norm.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, fx

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call: the target and its arguments, which are nodes, values, or calls that are made for this one."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Survivors = Callable[[int], Tensor]  # axis of the first operand -> bool (size,), which places along it are kept


@dataclass(frozen=True)
class Resize:
    """What a proposal may use: shapes of the output before and after the merge, and the call's arguments as values.

    survivors:  which places along an axis of the first operand are kept
    was, now:   the call with the values that its nodes have before and after the merge
    """

    before: Any
    after: Any
    survivors: Survivors
    was: Call
    now: Call


def resized(name: str, call: Call, about: Resize) -> Call | None:
    """The call with new literal sizes, for an op whose output narrows; None if no proposal is known.

    Sizes that the graph computes correctly are left to it. The caller must prove a proposal by running it.
    """
    proposal = PROPOSALS.get(name)
    return proposal(call, about) if proposal else None


def _sizes(call: Call, about: Resize) -> Call | None:
    """view, reshape, expand: sizes that are wrong become those of the new shape."""
    args, values, after = list(call.args), list(about.now.args), about.after
    packed = len(args) > 1 and isinstance(args[1], (list, tuple))
    sizes, values = (list(args[1]), list(values[1])) if packed else (args[1:], values[1:])
    if len(sizes) != len(after):
        return None
    new = [s if v in (-1, a) else a for s, v, a in zip(sizes, values, after, strict=True)]
    # computed from the batch size, say: a literal would hold for the example only
    computed = [at for at, s in enumerate(sizes) if isinstance(s, fx.Node) and new[at] is not s]
    if len(computed) == 1 and -1 not in values:
        new[computed[0]] = -1
        computed = []
    for at in computed:  # samples * heads becomes samples * heads * heads left // heads
        common = gcd(after[at], values[at])
        more = Call(operator.mul, (sizes[at], after[at] // common), {})
        new[at] = Call(operator.floordiv, (more, values[at] // common), {})
    return Call(call.target, (args[0], tuple(new)) if packed else (args[0], *new), call.kwargs)


def _made(call: Call, about: Resize) -> Call | None:
    """zeros, new_full, ...: the size is the first list, or all arguments after the tensor of a method."""
    args, values, after = list(call.args), list(about.now.args), about.after
    method = isinstance(call.target, str) or "new_" in str(call.target)
    first = next((at for at, arg in enumerate(args) if isinstance(arg, (list, tuple))), 1 if method else 0)
    packed = len(args) > first and isinstance(args[first], (list, tuple))
    if "size" in call.kwargs and len(args) <= first:
        kwargs = {**call.kwargs, "size": _corrected(call.kwargs["size"], about.now.kwargs["size"], after)}
        return Call(call.target, call.args, kwargs)
    if packed:
        args[first] = _corrected(args[first], values[first], after)
    else:
        args[first:] = _corrected(args[first:], values[first:], after)
    return Call(call.target, tuple(args), call.kwargs)


def _corrected(sizes: Any, values: Any, after: Shape) -> tuple[Any, ...]:
    return tuple(s if v == a else a for s, v, a in zip(sizes, values, after, strict=True))


def _repeats(call: Call, about: Resize) -> Call | None:
    """repeat(x, 32): a number of copies becomes that of the kept ones."""
    args, before, after = list(call.args), about.before, about.after
    packed = len(args) == 2 and isinstance(args[1], (list, tuple))
    counts = list(args[1]) if packed else args[1:]
    if len(counts) != len(after) or not all(isinstance(c, (int, fx.Node)) for c in counts):
        return None
    new = [c if b == a or isinstance(c, fx.Node) else c * a // b for c, b, a in zip(counts, before, after, strict=True)]
    return Call(call.target, (args[0], tuple(new)) if packed else (args[0], *new), call.kwargs)


def _unflatten(call: Call, about: Resize) -> Call | None:
    """unflatten: literal sizes become those of the new shape."""
    if len(call.args) != 3 or not isinstance(call.args[2], (list, tuple)):
        return None
    (x, dim, sizes), after = call.args, about.after
    start = dim % (len(after) - len(sizes) + 1)
    new = [a if isinstance(s, int) and s != -1 else s for s, a in zip(sizes, after[start:], strict=False)]
    return Call(call.target, (x, dim, tuple(new)), call.kwargs)


def _pieces(call: Call, about: Resize) -> Call | None:
    """chunk and split: an explicit list of sizes along the axis that is cut."""
    axis = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else 0)
    sizes = [a[axis % len(a)] for a in about.after]
    return Call("split" if isinstance(call.target, str) else torch.split, (call.args[0], sizes, axis), {})


def _index(call: Call, about: Resize) -> Call | None:
    """x[:, 8:24]: a bound becomes the number of kept places before it. None for other indices along a narrowed axis."""
    index, values = (c.args[1] if isinstance(c.args[1], tuple) else (c.args[1],) for c in (call, about.was))
    new: list[Any] = []
    axis, given = 0, len(about.before) + sum(isinstance(v, int) for v in values) - values.count(None)
    for at, (item, value) in enumerate(zip(index, values, strict=True)):
        if item is None or item is Ellipsis:
            new.append(item)
            if item is Ellipsis:  # all axes but those that the remaining indices take
                axis = given - sum(v is not None for v in values[at + 1 :])
            continue
        stays = about.survivors(axis)
        if not bool(stays.all()):
            if not isinstance(value, slice) or value.step not in (None, 1):
                return None
            start, stop, _ = value.indices(len(stays))
            item = slice(
                None if value.start is None else int(stays[:start].sum()),
                None if value.stop is None else int(stays[:stop].sum()),
            )
        new.append(item)
        axis += 1
    return Call(call.target, (call.args[0], tuple(new)), call.kwargs)


def _narrow(call: Call, about: Resize) -> Call | None:
    """narrow(x, dim, start, length): start and length become numbers of kept places."""
    if len(call.args) != 4:
        return None
    x, dim, start, length = call.args[0], *about.was.args[1:]
    stays = about.survivors(dim)
    start %= len(stays)
    return Call(call.target, (x, dim, int(stays[:start].sum()), int(stays[start : start + length].sum())), call.kwargs)


def _slice(call: Call, about: Resize) -> Call | None:
    """aten.slice(x, dim, start, end): a bound becomes the number of kept places before it."""
    given: list[Any] = [call.args[0], *about.was.args[1:], *(0, None, None, 1)[len(call.args) - 1 :]]
    x, dim, start, end, step = given
    stays = about.survivors(dim)
    if step != 1 or not all(b is None or isinstance(b, int) for b in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(len(stays))
    return Call(call.target, (x, dim, int(stays[:first].sum()), int(stays[:last].sum())), {})


def _pad(call: Call, about: Resize) -> Call | None:
    """Zeros next to channels: those that are kept are split into left and right in the old proportion."""
    if len(call.args) < 2 or not all(isinstance(p, int) for p in call.args[1]):
        return None
    before, after, survivors = about.before, about.after, about.survivors
    pads, dims = list(call.args[1]), len(after)
    for at in range(0, len(pads), 2):
        axis = dims - 1 - at // 2
        inside = int(survivors(axis).sum())
        if after[axis] != before[axis] and pads[at] + pads[at + 1]:
            added = after[axis] - inside
            left = round(added * pads[at] / (pads[at] + pads[at + 1]))
            pads[at], pads[at + 1] = left, added - left
    return Call(call.target, (call.args[0], tuple(pads), *call.args[2:]), call.kwargs)


PROPOSALS: dict[str, Callable[[Call, Resize], Call | None]] = {
    "view": _sizes,
    "new": _made,
    "random": _made,
    "repeat": _repeats,
    "expand": _sizes,
    "unflatten": _unflatten,
    "chunk": _pieces,
    "split": _pieces,
    "getitem": _index,
    "narrow": _narrow,
    "pad": _pad,
    "slice": _slice,
}


Blocks = tuple[int, int]  # groups of the layer that a call is, before and after the merge
Implicit = Callable[[Call, list[Shape | None], list[Shape | None], Blocks], Call | None]


def _with(call: Call, position: int, name: str, value: Any) -> Call:
    """The call with one argument replaced where it was given, or added by name."""
    if len(call.args) > position:
        return Call(call.target, (*call.args[:position], value, *call.args[position + 1 :]), call.kwargs)
    return Call(call.target, call.args, {**call.kwargs, name: value})


def _attention(call: Call, before: list[Shape | None], after: list[Shape | None], blocks: Blocks) -> Call | None:
    """The scale stays 1 / sqrt(d) for the original head width d."""
    given = call.kwargs.get("scale", call.args[6] if len(call.args) > 6 else None)
    if given is not None or before[0] is None or after[0] is None or before[0][-1] == after[0][-1]:
        return None
    return _with(call, 6, "scale", before[0][-1] ** -0.5)


def _normalized(call: Call, before: list[Shape | None], after: list[Shape | None], blocks: Blocks) -> Call | None:
    """layer_norm and rms_norm take the shape of the last axes."""
    given = call.kwargs.get("normalized_shape", call.args[1] if len(call.args) > 1 else None)
    if before[0] is None or after[0] is None or not isinstance(given, (list, tuple)) or before[0] == after[0]:
        return None
    last = after[0][len(after[0]) - len(given) :]
    new = tuple(now if isinstance(was, int) else was for was, now in zip(given, last, strict=True))
    return _with(call, 1, "normalized_shape", new)


def _counted(position: int, name: str) -> Implicit:
    """The groups of a convolution or a group norm: as many as are left."""

    def follow(call: Call, before: list[Shape | None], after: list[Shape | None], blocks: Blocks) -> Call | None:
        return _with(call, position, name, blocks[1]) if blocks[0] != blocks[1] else None

    return follow


# rule -> the call for operands that narrow from shapes `before` to `after`, or None if it need not change
IMPLICIT: dict[str, Implicit] = {
    "attention": _attention,
    "layer_norm": _normalized,
    "rms_norm": _normalized,
    "conv": _counted(6, "groups"),
    "conv_transpose": _counted(6, "groups"),
    "group_norm": _counted(1, "num_groups"),
}
