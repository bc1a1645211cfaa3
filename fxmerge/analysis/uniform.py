"""Activations that are the same for all channels, whatever the weights are: `torch.ones_like(q)`, `q * 0 + 1`.

Such a tensor tells nothing but its size. An op that runs over its channels, such as `torch.ones_like(q).sum(-1)`,
therefore gives a function of the width, which has to stay what it is. (A width that is asked for by `q.size(-1)` keeps
its value; see `original_values.py`.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx

from fxmerge.graph import nested
from fxmerge.ir.labels import holds, numbers
from fxmerge.ir.provenance import Kind, Lab, Param, View

_FILLED = ("zeros_like", "ones_like", "full_like", "empty_like", "random_like", "fill", "zero")  # rules
_TESTS = ("isfinite", "isnan", "isinf", "isposinf", "isneginf")  # rules that give the same for all finite values
_ITSELF = ("sub", "div", "compare")  # rules whose result is known where both operands are one
_KEEPS = ("movement", "per_channel", "tie", "mixer", "contraction")  # kinds of ops without values of their own


def is_uniform(
    node: fx.Node, rule: str, kind: Kind, sources: Sequence[tuple[str, Any]], uniform: Collection[str]
) -> bool:
    """Is the value of a node the same for all of its channels?

    sources: (name, value) of the nodes that it takes; uniform: those of them, and of others, that are such
    """
    if rule in (*_FILLED, *_TESTS) or (rule == "expand_as" and kind == "per_channel"):
        return True
    taken = [*node.args[:2], *(a for name, a in node.kwargs.items() if name in ("other", "exponent"))]
    if rule in ("mul", "pow") and any(type(a) in (int, float) and a == 0 for a in taken):
        return True
    if rule in _ITSELF and len(taken) == 2 and isinstance(taken[0], fx.Node) and taken[0] is taken[1]:
        return True
    if kind not in _KEEPS or (node.op == "call_module" and kind == "mixer"):
        return False
    if any(isinstance(v, (Param, View)) and _size(v) > 1 for _, v in sources):
        return False
    channels = _channels(sources)
    return bool(channels) and all(name in uniform for name, _ in channels)


def width_of(
    kind: Kind, value: Any, sources: Sequence[tuple[str, Any]], uniform: Collection[str], mixed: Sequence[Tensor]
) -> list[Tensor]:
    """The labels of channels of which a node's value shows nothing but how many they are.

    value: the node's; mixed: the labels among which it is a mixer
    """
    channels = _channels(sources)
    if kind in ("movement", "query", "tie", "producer", "unknown", "output") or not channels:
        return []
    if any(name not in uniform for name, _ in channels):
        return []
    labels = [v.t for _, v in channels]
    left = {n for v in nested.leaves(value) if isinstance(v, Lab) for n in numbers(v.t).tolist()}
    lost = any(set(numbers(t).tolist()) - left for t in labels)
    return [*labels, *mixed] if lost or mixed else []


def _channels(sources: Sequence[tuple[str, Any]]) -> list[tuple[str, Lab]]:
    return [(name, v) for name, values in sources for v in nested.leaves(values) if isinstance(v, Lab) and holds(v.t)]


def _size(value: Param | View) -> int:
    return (value.t if isinstance(value, View) else value.value).numel()
