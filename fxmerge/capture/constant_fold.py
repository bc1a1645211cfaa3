"""Folding: what a graph computes from parameters alone is computed once, and becomes a parameter itself.

A bias that is joined from pieces (q, 0, v), a weight that is standardised before each use, `1 + weight`: such values
do not depend on the input, and a layer whose weight is a parameter can be merged where one whose weight is computed
cannot. Folded is only what must be: the computed weight or bias of a layer, and arithmetic whose result is no larger
than the parameters it is made of. Views of a parameter stay views; a table that is gathered from stays a table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxmerge.graph.ops import in_place
from fxmerge.ir.capture import FOLDED
from fxmerge.rules import movement
from fxmerge.rules.lookup import rule_of
from fxmerge.weights.by_path import at
from fxmerge.weights.disk_tensor import beside

_Made = tuple[str, tuple[str, ...]]  # a new parameter's path, and the paths of what it is made of
_RANDOM = ("dropout", "rrelu", "stochastic_depth", "new")
_TABLES = ("embedding", "embedding_bag")  # rows of a table: no arithmetic either


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """The graph module, changed in place: constant subgraphs are folded, and parameters that nothing uses then go.

    Raises nothing: what cannot be computed is left as it stands.
    """
    _unturned(module)
    constant: dict[fx.Node, bool] = {}  # node that depends on parameters alone -> is there arithmetic in it?
    updates: list[fx.Node] = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constant[node] = False
        elif node.op in ("call_function", "call_method") and node.all_input_nodes:
            found = rule_of(node, module)
            update, alone = in_place(node, node.target), all(n in constant for n in node.all_input_nodes)
            if update and node.all_input_nodes[0] in constant:
                updates.append(node)
                if not alone or not _repeatable(node.target):
                    return module  # what is made of parameters is another tensor in each run
            if alone and (update or (found is not None and found.name not in _RANDOM)):
                moves = found is not None and (found.kind in ("movement", "query") or found.name in _TABLES)
                constant[node] = not moves or any(constant[n] for n in node.all_input_nodes)
    updated = _updated(module, constant, updates) if updates else {}
    if updated is None:
        return module
    constant.update(dict.fromkeys(updated, True))
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    made: dict[str, _Made] = {}
    for node, computed in list(constant.items()):
        outside = [u for u in node.users if u not in constant]
        if node.op == "get_attr" or not outside:
            continue
        weighs = [u for u in outside if _as_weight(module, u, node)]
        if computed or weighs:
            _replace(module, node, weighs if not computed else outside, bool(weighs), made, updated)
    if made:
        kept = any(u not in constant for node in updated for u in node.users)
        for node in reversed(constant):
            if not node.users and not (kept and node in updated):
                module.graph.erase_node(node)
        _drop_unused(module, used)
        module.recompile()
    return module


def _updated(
    module: fx.GraphModule, constant: dict[fx.Node, bool], updates: list[fx.Node]
) -> dict[fx.Node, Any] | None:
    """The values that share memory with what is updated in place, after the last update.

    None where that cannot be said once for all: a parameter itself is written, or somebody reads in between.
    """
    values: dict[fx.Node, Any] = {}
    place = {node: number for number, node in enumerate(module.graph.nodes)}

    def memory(value: Any) -> int:
        return value.untyped_storage()._cdata if isinstance(value, Tensor) else 0

    last: dict[int, int] = {}  # memory -> place of its last update
    try:
        with torch.no_grad():
            for node in constant:
                if node in updates:
                    written = memory(values[node.all_input_nodes[0]])
                    if written in {memory(values[n]) for n in values if n.op == "get_attr"}:
                        return None
                    last[written] = place[node]
                values[node] = _called(module, node, values.__getitem__)
        found = {node: value for node, value in values.items() if memory(value) in last}
    except (TypeError, RuntimeError, ValueError, IndexError):
        return None
    read = [(user, value) for node, value in found.items() for user in node.users if user not in constant]
    return None if any(place[user] < last[memory(value)] for user, value in read) else found


def _repeatable(target: Any) -> bool:
    """Does an op in place do the same in each run? One that is not torch's might not."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "").split(".")[0]
    packet = getattr(torch.ops.aten, name, None)
    random = torch.Tag.nondeterministic_seeded
    if packet is None:
        return target is operator.setitem
    return not any(random in getattr(packet, overload).tags for overload in packet.overloads())


def _called(module: fx.GraphModule, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """What a node of a constant subgraph gives."""
    if node.op == "get_attr":
        return at(module, str(node.target))
    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    target: Any = node.target
    return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def _unturned(module: fx.GraphModule) -> None:
    """x @ w.t() becomes F.linear(x, w), and F.linear(x, w.t(), b) becomes x @ w + b, so that w is one weight for all.

    However the transpose of a parameter is spelled; a copy of it would be no longer shared with whoever else has it.
    """
    calls, changed = ("call_function", "call_method"), False
    for node in list(module.graph.nodes):
        found = rule_of(node, module) if node.op in calls else None
        name = found.name if found is not None else ""
        if name not in ("matmul", "linear") or not 2 <= len(node.args) + len(node.kwargs) <= 3:
            continue
        turned = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        weight = _transposed(module, turned)
        if weight is None:
            continue
        if name == "matmul":
            node.op, node.target, node.args = "call_function", F.linear, (node.args[0], weight)
        else:
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            x = node.args[0] if node.args else node.kwargs["input"]
            node.target, node.args, node.kwargs = torch.matmul, (x, weight), {}
            if bias is not None:
                with module.graph.inserting_after(node):
                    total = module.graph.call_function(operator.add, (node, bias))
                total.meta = dict(node.meta)
                node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
        if not turned.users:
            module.graph.erase_node(turned)
        changed = True
    if changed:
        module.graph.lint()
        module.recompile()


def _transposed(module: fx.GraphModule, turned: Any) -> fx.Node | None:
    """The parameter that a node is the transpose of."""
    if not isinstance(turned, fx.Node) or turned.op not in ("call_function", "call_method"):
        return None
    row = rule_of(turned, module)
    if len(turned.all_input_nodes) != 1 or row is None or row.kind not in ("movement", "query"):
        return None
    (weight,) = turned.all_input_nodes
    value = at(module, str(weight.target)) if weight.op == "get_attr" else None
    if not isinstance(value, Tensor) or value.dim() != 2:
        return None
    places = torch.arange(value.numel()).view(value.shape)
    moved = movement.run(turned.target, (places, *turned.args[1:]), turned.kwargs)
    return weight if isinstance(moved, Tensor) and torch.equal(moved, places.t()) else None


def _as_weight(module: fx.GraphModule, user: fx.Node, node: fx.Node) -> bool:
    """Is the node the weight or bias of this layer, and not its input?"""
    if user.op not in ("call_function", "call_method"):
        return False
    found = rule_of(user, module)
    return found is not None and found.kind in ("producer", "per_channel_param") and node not in user.args[:1]


def _spelled(value: Any, updated: Container[fx.Node]) -> str:
    """A constant subgraph as text: the same text is the same value."""
    if isinstance(value, fx.Node):
        if value in updated:
            return value.name
        if value.op == "get_attr":
            return f"self.{value.target}"
        called = value.target if isinstance(value.target, str) else id(value.target)
        return f"{called}({_spelled(value.args, updated)}, {_spelled(value.kwargs, updated)})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_spelled(v, updated) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_spelled(v, updated)}' for k, v in value.items())}}}"
    return repr(value)


def _replace(
    module: fx.GraphModule, node: fx.Node, users: list[fx.Node], as_weight: bool, known: dict[str, _Made],
    updated: Mapping[fx.Node, Any],
) -> None:  # fmt: skip
    """Put a new parameter in the place of the node, for these users; one parameter for one value (`known`)."""
    text = _spelled(node, updated)
    computed = known.get(text) or _computed(module, node, as_weight, updated)
    if computed is None:
        return
    known[text] = computed
    path, sources = computed
    with module.graph.inserting_before(node):
        fetched = module.graph.get_attr(path)
    fetched.meta = {**node.meta, FOLDED: sources}
    for user in users:
        user.replace_input_with(node, fetched)


def _computed(module: fx.GraphModule, node: fx.Node, as_weight: bool, updated: Mapping[fx.Node, Any]) -> _Made | None:
    """A new parameter with the node's value, or None where it should stay as it is.

    Where all that it is made of are buffers it is a buffer too.
    """
    values: dict[fx.Node, Any] = {}
    sources: list[fx.Node] = []

    def value(of: fx.Node) -> Any:
        if of not in values:
            if of.op == "get_attr":
                sources.append(of)
            if of in updated:  # and not updated once more, but what it is made of is asked for
                for source in of.all_input_nodes:
                    value(source)
            values[of] = updated[of] if of in updated else _called(module, of, value)
        return values[of]

    try:
        with torch.no_grad():
            made = value(node)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return None
    held = [values[s] for s in sources]
    if not isinstance(made, Tensor) or not made.is_floating_point() or not all(isinstance(h, Tensor) for h in held):
        return None
    if not as_weight and made.numel() > sum(h.numel() for h in held):
        return None
    trained = [s for s, h in zip(sources, held, strict=True) if isinstance(h, nn.Parameter)]
    owner, _, name = str((trained or sources)[0].target).rpartition(".")
    holder, path = module.get_submodule(owner), name + "_folded"
    while hasattr(holder, path):
        path += "_"
    found = made.detach().clone().contiguous()
    for source in held:
        found = beside(source, found)
    if trained:
        grad = any(values[s].requires_grad for s in trained)
        holder.register_parameter(path, nn.Parameter(found, requires_grad=grad))
    else:
        holder.register_buffer(path, found)
    return f"{owner}.{path}".lstrip("."), tuple(str(s.target) for s in sources)


def _drop_unused(module: fx.GraphModule, before: set[str]) -> None:
    """Delete the parameters that the folded graph no longer fetches, and modules that are empty then."""
    after = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = tuple(str(n.target) + "." for n in module.graph.nodes if n.op == "call_module")
    for path in before - after:
        if not path.startswith(called):
            owner, _, name = path.rpartition(".")
            delattr(module.get_submodule(owner), name)
