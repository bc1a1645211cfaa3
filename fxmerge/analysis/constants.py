"""Constants that follow the channels that they meet: `torch.zeros(b, 16, h, w)`, `x.new_full(x.shape, 0.3)`.

A constant that is made in the graph, and is equal along an axis of channels that it meets, can be made narrower. Which
of its axes meet channels is found by one run on labels. In the next run these axes get labels of their own, which are
tied to what they meet; the literal sizes of the call are then corrected like those of a movement.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from torch import Tensor, fx

from fxmerge.ir.labels import simplify
from fxmerge.ir.provenance import Lab, Param, View
from fxmerge.rules.facts import FactsBuilder
from fxmerge.rules.lookup import rule_of

_MAKERS = (
    "new",
    "random",
    "expand",
    "expand_as",
    "repeat",
)  # rules of calls that can make a wider constant
_PASSING = ("per_channel", "tie", "query", "movement")  # kinds of calls whose first operand may be such a constant


def makers(
    wanted: Mapping[str, Collection[int]], module: fx.GraphModule, values: Mapping[fx.Node, Any]
) -> dict[str, tuple[int, ...]]:
    """The calls that make constants whose axes meet channels, with these axes.

    wanted: node whose value meets channels -> its axes that do. The node may be a function of the constant.
    """
    nodes, found = {n.name: n for n in module.graph.nodes}, {}
    for name, axes in wanted.items():
        node: fx.Node | None = nodes[name]
        shape = _shape(values.get(nodes[name]))
        while node is not None and not _makes(node, module):
            if not _passes(node, module):
                node = None
                break
            node = next((n for n in node.all_input_nodes if _shape(values.get(n)) == shape), None)
        if node is not None and axes and _can_follow(node, module, values, axes):
            found[node.name] = tuple(sorted(axes))
    return found


def labelled(facts: FactsBuilder, node: fx.Node, value: Any, axes: tuple[int, ...]) -> Lab:
    """The constant that a call makes, with new labels along these axes; what it is made of keeps its shape."""
    if isinstance(value, View):
        facts.freeze(node, value.param, "is the same for all channels")
    shape = _shape(value)
    assert shape is not None
    sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    return Lab(simplify(facts.fresh(prod(sizes)).view(sizes).expand(shape)))


def passes_factor(node: fx.Node, value: Any, module: fx.GraphModule) -> bool:
    """Does a factor of the channels pass what this constant does to them: zeros, and filters of convolutions?"""
    rules = [(rule_of(user, module), user) for user in node.users]
    filters = all(r is not None and r.name in ("conv", "conv_transpose") and u.args[1:2] == (node,) for r, u in rules)
    return filters or (isinstance(value, Tensor) and not bool(value.any()))


def _passes(node: fx.Node, module: fx.GraphModule) -> bool:
    rule = rule_of(node, module)
    return rule is not None and rule.kind in _PASSING


def _makes(node: fx.Node, module: fx.GraphModule) -> bool:
    rule = rule_of(node, module)
    if rule is not None and rule.name == "identity":  # a copy, in a recorded graph, of what the user's code made
        return any(n.op == "get_attr" and bool(n.meta.get("constant")) for n in node.all_input_nodes)
    return rule is not None and rule.name in _MAKERS


def _shape(value: Any) -> tuple[int, ...] | None:
    value = value.t if isinstance(value, Lab) else value.value if isinstance(value, Param) else value
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _can_follow(node: fx.Node, module: fx.GraphModule, values: Mapping[fx.Node, Any], axes: Collection[int]) -> bool:
    """Is the constant equal along these axes, or random, and is no number in it computed from a size?"""
    rule, value = rule_of(node, module), values[node]
    assert rule is not None
    if rule.name in ("expand", "expand_as", "repeat"):  # along axes of size 1
        source = _shape(values.get(node.all_input_nodes[0]))
        made = _shape(value)
        if source is None or made is None:
            return False
        return all((1, *source)[max(0, a - len(made) + len(source) + 1)] == 1 for a in axes)
    name = str(getattr(node.target, "__name__", node.target))
    at = 2 if "new_full" in name else 1
    number = node.args[at] if len(node.args) > at else node.kwargs.get("fill_value")
    if "full" in name and isinstance(number, fx.Node):  # it may be computed from a width, and keeps its value
        return False
    if not isinstance(value, Tensor):
        return False
    return rule.name == "random" or all(bool((value == value.narrow(a, 0, 1)).all()) for a in axes)
