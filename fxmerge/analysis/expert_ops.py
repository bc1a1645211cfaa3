"""What each op does to the axes of experts, and to numbers of experts.

An op is followed where leaving an expert out gives what the op would give if no token could choose it. Any other op
refuses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxmerge.analysis.expert_axes import Call, ExpertAxes, Followed, Held, Numbers, Refused
from fxmerge.analysis.stacks import POINTWISE
from fxmerge.graph.nested import leaves
from fxmerge.graph.ops import plain_name
from fxmerge.rules.call_names import call_name
from fxmerge.weights.by_path import at

_SAME = (
    *(POINTWISE - {"query", "glu"}), "bitwise_not", "logical_not", "logical_and", "logical_or", "clamp",
)  # fmt: skip
_REDUCED = ("sum", "mean", "amax", "max", "amin", "min", "prod", "any", "all", "logsumexp", "norm")
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
            return whole[node.args[1]] if isinstance(node.args[1], int) else _unknown(node)
    if own.facts.kinds.get(node.name) == "query":
        return None if call.last_name in _NO_NUMBER else _unknown(node)
    first = call.value(call.first)
    if any(v == Numbers(within=True) for v in map(call.value, node.all_input_nodes)):
        return _unknown(node)
    if isinstance(first, Numbers) and (name == "identity" or own.facts.kinds.get(node.name) == "movement"):
        return first if not any(map(call.value, call.others)) else _unknown(node)
    if rule := _RULES.get(name):
        return rule(own, node, call)
    if name in _SAME:
        return _pointwise(own, node)
    return _reduced(own, node, call, name) if name in _REDUCED else _unknown(node)


def _unknown(node: fx.Node) -> Refused:
    return Refused(f"{call_name(node)} reads what follows the number of experts")


def _pointwise(own: ExpertAxes, node: fx.Node) -> Followed:
    """The operands are aligned at their last axes, as in broadcasting."""
    roles = [""] * len(own.shape(node))
    for source in node.all_input_nodes:
        value = own.values.get(source.name)
        if value is not None and not isinstance(value, Held):
            return _unknown(node)
        for axis, role in enumerate(reversed(value.roles), 1) if value is not None else ():
            if axis > len(roles) or (role and roles[-axis] not in ("", role)):
                return _unknown(node)
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
            if source.op != "get_attr" or roles[-axis] == "P":
                return f"{call_name(source)} has a value for each expert, but is not a parameter"
            own.tensors[str(source.target)] = len(shape) - axis
    return ""


def _reduced(own: ExpertAxes, node: fx.Node, call: Call, name: str) -> Followed:
    first = call.value(call.first)
    axes = call.axes(len(first.roles)) if isinstance(first, Held) else None
    if axes is None or not isinstance(first, Held):
        return _unknown(node)
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


Rule = Callable[[ExpertAxes, fx.Node, Call], Followed]


def _unknown(node: fx.Node) -> Refused:
    return Refused(f"{call_name(node)} reads what follows the number of experts")


def _view(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """The experts are along the last axis, in the source and in the result, or in groups along the last two."""
    first, shape = call.value(call.first), own.shape(node)
    if isinstance(first, Numbers):
        return Numbers()
    if not isinstance(first, Held) or not shape:
        return _unknown(node)
    experts, sizes = own.experts, call.lengths()
    flat = first.roles[-1] == "E" and not any(first.roles[:-1])
    if not flat and not (first.roles[-2:] == ("G", "P") and not any(first.roles[:-2])):
        return _unknown(node)
    last: Any = sizes[-1] if len(sizes) == len(shape) else None
    if shape[-1] == experts:
        if last is not None and last[1] != -1:
            own.sized(node, last[0], "all")
        return Held((*[""] * (len(shape) - 1), "E")) if last is not None else _unknown(node)
    if last is not None and len(shape) > 1 and shape[-1] * shape[-2] == experts and own.groups in (1, shape[-2]):
        own.groups = shape[-2]
        if last[1] != -1:
            own.sized(node, last[0], "each")
        return Held((*[""] * (len(shape) - 2), "G", "P"))
    return _unknown(node)


def _expand(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """A value of each group, (..., groups, 1), for each of the experts in it."""
    first, shape, sizes = call.value(call.first), own.shape(node), call.lengths()
    if not isinstance(first, Held) or len(sizes) != len(shape) or len(first.roles) != len(shape):
        return _unknown(node)
    source = own.shape(call.first)
    roles = list(first.roles)
    for axis, (place, size) in enumerate(sizes):
        if source[axis] == 1 and shape[axis] > 1:
            if not (roles[axis - 1 : axis] == ["G"] and shape[axis] * own.groups == own.experts and size != -1):
                return _unknown(node)
            roles[axis] = "P"
            own.sized(node, place, "each")
        elif roles[axis] in ("E", "P") and size != -1:
            own.sized(node, place, "all" if roles[axis] == "E" else "each")
    return Held(tuple(roles))


def _unsqueeze(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, axis = call.value(call.first), call.named("dim", 1)
    if isinstance(first, Numbers):
        return first
    if not isinstance(first, Held) or not isinstance(axis, int):
        return _unknown(node)
    axis %= len(first.roles) + 1
    return Held((*first.roles[:axis], "", *first.roles[axis:]))


def _transpose(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, axes = call.value(call.first), (call.named("dim0", 1), call.named("dim1", 2))
    if isinstance(first, Numbers):
        return first
    if not isinstance(first, Held) or not all(isinstance(a, int) for a in axes):
        return _unknown(node)
    one, other = (a % len(first.roles) for a in axes)
    roles = list(first.roles)
    roles[one], roles[other] = roles[other], roles[one]
    return Held(tuple(roles))


def _softmax(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, axis = call.value(call.first), call.named("dim", 1)
    if node.op == "call_module":
        axis = getattr(own.captured.module.get_submodule(str(node.target)), "dim", None)
    if not isinstance(first, Held) or not isinstance(axis, int):
        return _unknown(node)
    if first.roles[axis] in ("E", "P"):
        own.choices[node.name] = first.roles
    return first


def _topk(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, count, axis = call.value(call.first), call.named("k", 1), call.named("dim", 2, -1)
    if not isinstance(first, Held) or type(count) is not int or not isinstance(axis, int):
        return _unknown(node)
    if call.named("largest", 3, True) is not True:
        return _unknown(node)
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


def _gather(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, axis, index = call.value(call.first), call.named("dim", 1), call.named("index", 2)
    if not isinstance(first, Held) or not isinstance(axis, int) or not isinstance(call.value(index), Numbers):
        return _unknown(node)
    axis %= len(first.roles)
    if first.roles[axis] != "E" or any(r for a, r in enumerate(first.roles) if a != axis):
        return _unknown(node)
    return None


def _scatter(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """Entries of chosen groups, or of chosen experts."""
    first, axis, index = call.value(call.first), call.named("dim", 1), call.value(call.named("index", 2))
    if not isinstance(first, Held) or not isinstance(axis, int) or call.value(call.named("src", 3)) is not None:
        return _unknown(node)
    wanted = {"E": Numbers, "G": type(None)}.get(first.roles[axis])
    return first if wanted is not None and isinstance(index, wanted) else _unknown(node)


def _sort(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    return (Numbers(), None) if isinstance(call.value(call.first), Numbers) else _unknown(node)


def _argsort(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    return None if isinstance(call.value(call.first), Numbers) else _unknown(node)


def _histc(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """One bin for each expert."""
    bins, low, high = (call.named(n, i) for i, n in enumerate(("bins", "min", "max"), 1))
    if not isinstance(call.value(call.first), Numbers) or (bins, low, high) != (own.experts, 0, own.experts - 1):
        return _unknown(node)
    own.sized(node, call.place("bins", 1), "all")
    own.sized(node, call.place("max", 3), "last")
    return Held(("E",))


def _counted(name: str, position: int) -> Rule:
    """An op with one entry for each expert along a new last axis, whose number is an argument."""

    def rule(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
        shape = own.shape(node)
        if not isinstance(call.value(call.first), Numbers) or call.named(name, position) != own.experts:
            return _unknown(node)
        own.sized(node, call.place(name, position), "all")
        return Held((*[""] * (len(shape) - 1), "E"))

    return rule


def _cumsum(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first = call.value(call.first)
    return first if isinstance(first, Held) and first.roles == ("E",) else _unknown(node)


def _products(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """Rows times the matrix of their expert. Offsets have a value for each expert, as the stack has a matrix."""
    stacks = [own.values.get(n.name) for n in node.all_input_nodes if own.values.get(n.name) is not None]
    fits = all(isinstance(value, Held) and value.roles[0] == "E" and not any(value.roles[1:]) for value in stacks)
    return None if fits and len(stacks) == 2 and call.value(call.first) is None else _unknown(node)


def _index(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """table[i] for numbers of experts, or rows of them in another order."""
    table, given = call.value(call.first), [n for n in leaves(list(node.args[1:])) if isinstance(n, fx.Node)]
    numbers = [call.value(n) for n in given]
    if isinstance(table, Held) and table.roles[0] == "E" and not any(table.roles[1:]):
        return None if len(numbers) == 1 and isinstance(numbers[0], Numbers) else _unknown(node)
    return table if isinstance(table, Numbers) and not any(numbers) else _unknown(node)


_RULES: dict[str, Rule] = {
    "view": _view, "reshape": _view, "flatten": _view, "expand": _expand, "unsqueeze": _unsqueeze,
    "transpose": _transpose, "softmax": _softmax, "log_softmax": _softmax, "topk": _topk, "gather": _gather, "scatter": _scatter, "sort": _sort,
    "argsort": _argsort, "histc": _histc, "bincount": _counted("minlength", 2),
    "one_hot": _counted("num_classes", 1), "cumsum": _cumsum, "grouped_mm": _products, "index": _index,
    "getitem": _index, "index_select": _index,
}  # fmt: skip
