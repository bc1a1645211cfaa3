"""What ops that move values, or that read numbers of experts, do to the axes of experts."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxmerge.analysis.expert_axes import Call, ExpertAxes, Followed, Held, Numbers, Rule, unknown
from fxmerge.graph.nested import leaves


def _view(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """The experts are along the last axis, in the source and in the result, or in groups along the last two."""
    first, shape = call.value(call.first), own.shape(node)
    if isinstance(first, Numbers):
        return Numbers()
    if not isinstance(first, Held) or not shape:
        return unknown(node)
    experts, sizes = own.experts, call.lengths()
    flat = first.roles[-1] == "E" and not any(first.roles[:-1])
    if not flat and not (first.roles[-2:] == ("G", "P") and not any(first.roles[:-2])):
        return unknown(node)
    last: Any = sizes[-1] if len(sizes) == len(shape) else None
    if shape[-1] == experts:
        if last is not None and last[1] != -1:
            own.sized(node, last[0], "all")
        return Held((*[""] * (len(shape) - 1), "E")) if last is not None else unknown(node)
    if last is not None and len(shape) > 1 and shape[-1] * shape[-2] == experts and own.groups in (1, shape[-2]):
        own.groups = shape[-2]
        if last[1] != -1:
            own.sized(node, last[0], "each")
        return Held((*[""] * (len(shape) - 2), "G", "P"))
    return unknown(node)


def _expand(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """A value of each group, (..., groups, 1), for each of the experts in it."""
    first, shape, sizes = call.value(call.first), own.shape(node), call.lengths()
    if not isinstance(first, Held) or len(sizes) != len(shape) or len(first.roles) != len(shape):
        return unknown(node)
    source = own.shape(call.first)
    roles = list(first.roles)
    for axis, (place, size) in enumerate(sizes):
        if source[axis] == 1 and shape[axis] > 1:
            if not (roles[axis - 1 : axis] == ["G"] and shape[axis] * own.groups == own.experts and size != -1):
                return unknown(node)
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
        return unknown(node)
    axis %= len(first.roles) + 1
    return Held((*first.roles[:axis], "", *first.roles[axis:]))


def _transpose(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, axes = call.value(call.first), (call.named("dim0", 1), call.named("dim1", 2))
    if isinstance(first, Numbers):
        return first
    if not isinstance(first, Held) or not all(isinstance(a, int) for a in axes):
        return unknown(node)
    one, other = (a % len(first.roles) for a in axes)
    roles = list(first.roles)
    roles[one], roles[other] = roles[other], roles[one]
    return Held(tuple(roles))


def _gather(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first, axis, index = call.value(call.first), call.named("dim", 1), call.named("index", 2)
    if not isinstance(first, Held) or not isinstance(axis, int) or not isinstance(call.value(index), Numbers):
        return unknown(node)
    axis %= len(first.roles)
    if first.roles[axis] != "E" or any(r for a, r in enumerate(first.roles) if a != axis):
        return unknown(node)
    return None


def _scatter(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """Entries of chosen groups, or of chosen experts."""
    first, axis, index = call.value(call.first), call.named("dim", 1), call.value(call.named("index", 2))
    if not isinstance(first, Held) or not isinstance(axis, int) or call.value(call.named("src", 3)) is not None:
        return unknown(node)
    fits = isinstance(index, Numbers) if first.roles[axis] == "E" else first.roles[axis] == "G" and index is None
    return first if fits else unknown(node)


def _sort(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    return (Numbers(), None) if isinstance(call.value(call.first), Numbers) else unknown(node)


def _argsort(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    return None if isinstance(call.value(call.first), Numbers) else unknown(node)


def _histc(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """One bin for each expert."""
    bins, low, high = (call.named(n, i) for i, n in enumerate(("bins", "min", "max"), 1))
    if not isinstance(call.value(call.first), Numbers) or (bins, low, high) != (own.experts, 0, own.experts - 1):
        return unknown(node)
    own.sized(node, call.place("bins", 1), "all")
    own.sized(node, call.place("max", 3), "last")
    return Held(("E",))


def _counted(name: str, position: int) -> Rule:
    """An op with one entry for each expert along a new last axis, whose number is an argument."""

    def rule(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
        shape = own.shape(node)
        if not isinstance(call.value(call.first), Numbers) or call.named(name, position) != own.experts:
            return unknown(node)
        own.sized(node, call.place(name, position), "all")
        return Held((*[""] * (len(shape) - 1), "E"))

    return rule


def _cumsum(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    first = call.value(call.first)
    return first if isinstance(first, Held) and first.roles == ("E",) else unknown(node)


def _products(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """Rows times the matrix of their expert. Offsets have a value for each expert, as the stack has a matrix."""
    stacks = [own.values.get(n.name) for n in node.all_input_nodes if own.values.get(n.name) is not None]
    fits = all(isinstance(value, Held) and value.roles[0] == "E" and not any(value.roles[1:]) for value in stacks)
    return None if fits and len(stacks) == 2 and call.value(call.first) is None else unknown(node)


def _index(own: ExpertAxes, node: fx.Node, call: Call) -> Followed:
    """table[i] for numbers of experts, or rows of them in another order."""
    table, given = call.value(call.first), [n for n in leaves(list(node.args[1:])) if isinstance(n, fx.Node)]
    numbers = [call.value(n) for n in given]
    if isinstance(table, Held) and table.roles[0] == "E" and not any(table.roles[1:]):
        return None if len(numbers) == 1 and isinstance(numbers[0], Numbers) else unknown(node)
    return table if isinstance(table, Numbers) and not any(numbers) else unknown(node)


MOVES: dict[str, Rule] = {
    "view": _view, "reshape": _view, "flatten": _view, "expand": _expand, "unsqueeze": _unsqueeze,
    "transpose": _transpose, "gather": _gather, "scatter": _scatter, "sort": _sort, "argsort": _argsort,
    "histc": _histc, "bincount": _counted("minlength", 2), "one_hot": _counted("num_classes", 1),
    "cumsum": _cumsum, "grouped_mm": _products, "index": _index, "getitem": _index, "index_select": _index,
}  # fmt: skip
