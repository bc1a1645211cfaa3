"""What each op does to the axes of experts, and to numbers of experts.

An op is followed where leaving an expert out gives what the op would give if no token could choose it. Any other op
refuses.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from torch import fx

from fxmerge.analysis.expert_axes import Call, ExpertAxes, Followed, Held, Numbers, Refused, Rule, unknown
from fxmerge.analysis.expert_moves import MOVES
from fxmerge.analysis.stacks import POINTWISE
from fxmerge.graph.ops import plain_name
from fxmerge.rules.call_names import call_name
from fxmerge.weights.by_path import at

_SAME = (
    *(POINTWISE - {"query", "glu"}), "bitwise_not", "logical_not", "logical_and", "logical_or", "clamp",
)  # fmt: skip
_REDUCED = ("sum", "mean", "amax", "max", "amin", "min", "prod", "any", "all", "logsumexp", "norm")
_CASTS = ("identity", "type_as", "int", "long", "float")
_NO_NUMBER = ("dtype", "device", "is_floating_point", "dim", "requires_grad", "is_cuda")


def start(own: ExpertAxes, node: fx.Node, params: Mapping[str, str]) -> str:
    """Begins with the scores of a linear layer. Returns why there is not one for each expert, or ""."""
    shape = own.shape(node)
    if not shape or shape[-1] != own.experts:
        return f"{call_name(node)} does not give one score for each expert"
    own.tensors |= dict.fromkeys(params.values(), 0)
    own.values[node.name] = Held((*[""] * (len(shape) - 1), "E"))
    return ""


def follow(own: ExpertAxes, node: fx.Node) -> str:
    """Follows one node, after those that it reads. Returns why that is not possible, or ""."""
    if node.op == "get_attr":
        if str(node.target) in own.stacks:
            own.tensors[str(node.target)] = 0
            rank = at(own.captured.module, str(node.target)).dim()
            own.values[node.name] = Held(("E", *[""] * (rank - 1)))
        return ""
    if all(own.values.get(n.name) is None for n in node.all_input_nodes):
        return ""
    made = _made(own, node)
    if isinstance(made, Refused):
        return made.reason
    if made is not None:
        own.values[node.name] = made
    return ""


def _made(own: ExpertAxes, node: fx.Node) -> Followed:
    name, call = own.facts.rules.get(node.name) or plain_name(node), Call(node, own.values)
    if node.op == "output":
        return Refused("the model returns values that follow the number of experts")
    if node.target is operator.getitem and isinstance(call.first, fx.Node):
        whole = own.values.get(call.first.name)
        if isinstance(whole, tuple):
            return whole[node.args[1]] if isinstance(node.args[1], int) else unknown(node)
    if own.facts.kinds.get(node.name) == "query":
        return None if call.last_name in _NO_NUMBER else unknown(node)
    first = call.value(call.first)
    if any(v == Numbers(within=True) for v in map(call.value, node.all_input_nodes)):
        return unknown(node)
    if isinstance(first, Numbers) and own.facts.kinds.get(node.name) == "movement":
        return first if not any(map(call.value, call.others)) else unknown(node)
    if name in _CASTS:  # a cast to another tensor's type reads no more of it
        return first
    if rule := _RULES.get(name):
        return rule(own, node, call)
    if name in _SAME:
        return _pointwise(own, node)
    return _reduced(own, node, call, name) if name in _REDUCED else unknown(node)


def _pointwise(own: ExpertAxes, node: fx.Node) -> Followed:
    """The operands are aligned at their last axes, as in broadcasting."""
    roles = [""] * len(own.shape(node))
    for source in node.all_input_nodes:
        value = own.values.get(source.name)
        if value is not None and not isinstance(value, Held):
            return unknown(node)
        for axis, role in enumerate(reversed(value.roles), 1) if value is not None else ():
            if axis > len(roles) or (role and roles[-axis] not in ("", role)):
                return unknown(node)
            roles[-axis] = role or roles[-axis]
    for source in node.all_input_nodes:
        why = _meets(own, source, roles) if own.values.get(source.name) is None else ""
        if why:
            return Refused(why)
    return Held(tuple(roles)) if any(roles) else None


def _meets(own: ExpertAxes, source: fx.Node, roles: Sequence[str]) -> str:
    """Notes a parameter with an entry for each expert. Returns why an operand without experts does not fit, or ""."""
    shape = own.shape(source)
    for axis in range(1, len(shape) + 1):
        if roles[-axis] in ("E", "P") and shape[-axis] > 1:
            held, moved = source, list[fx.Node]()
            while own.facts.rules.get(held.name) in ("squeeze", "unsqueeze", "identity") and held.all_input_nodes:
                moved.append(held)
                held = held.all_input_nodes[0]
            along = [a for a, size in enumerate(own.shape(held)) if size > 1]
            if held.op != "get_attr" or roles[-axis] == "P" or len(along) != 1:
                return f"{call_name(source)} has a value for each expert, but is not a parameter"
            own.tensors[str(held.target)] = along[0]
            for node in (*moved, held):
                own.values[node.name] = Held(tuple("E" if size > 1 else "" for size in own.shape(node)))
    return ""


def _reduced(own: ExpertAxes, node: fx.Node, call: Call, name: str) -> Followed:
    first = call.value(call.first)
    axes = call.axes(len(first.roles)) if isinstance(first, Held) else None
    if axes is None or not isinstance(first, Held):
        return unknown(node)
    over = {first.roles[axis] for axis in axes}
    if over & {"E", "P"} and name not in ("amax", "max"):
        return Refused(f"{call_name(node)} runs over the scores of all experts")
    keep = bool(call.named("keepdim", 2))
    left = [("" if a in axes else r) for a, r in enumerate(first.roles) if keep or a not in axes]
    value = Held(tuple(left)) if any(left) else None
    if over & {"E", "P"}:
        own.choices[node.name] = first.roles
    if name != "max":
        return value
    return value, Numbers(within=over != {"E"}) if over & {"E", "P"} else value


def _softmax(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, axis = call.value(call.first), call.named("dim", 1)
    if node.op == "call_module":
        axis = getattr(own.captured.module.get_submodule(str(node.target)), "dim", None)
    if not isinstance(first, Held) or not isinstance(axis, int):
        return unknown(node)
    if first.roles[axis] in ("E", "P"):
        own.choices[node.name] = first.roles
    return first


def _topk(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, count, axis = call.value(call.first), call.named("k", 1), call.named("dim", 2, -1)
    if not isinstance(first, Held) or type(count) is not int or not isinstance(axis, int):
        return unknown(node)
    if call.named("largest", 3, True) is not True:
        return unknown(node)
    axis %= len(first.roles)
    role = first.roles[axis]
    roles = [r if a != axis else "" for a, r in enumerate(first.roles)]
    if role in ("E", "P"):
        own.choices[node.name] = first.roles
    own.chosen[role] = max(count, own.chosen.get(role, 0)) if role != "G" else min(count, own.chosen.get(role, count))
    value = Held(tuple(roles)) if any(roles) else None
    if role == "P":
        return value, Numbers(within=True)
    return value, Numbers() if role == "E" else value


_RULES: dict[str, Rule] = {"softmax": _softmax, "log_softmax": _softmax, "topk": _topk, **MOVES}
