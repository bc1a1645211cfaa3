"""Constant folding: values that a graph computes from parameters alone are computed once and become parameters.

Examples are a bias concatenated from pieces (q, 0, v), a weight that is standardised before each use, and `1 + weight`.
Such values do not depend on the input, and a layer can be merged only if its weight is a parameter. Two kinds of values
are folded: a computed weight or bias of a layer, and the result of arithmetic that is no larger than the parameters it
is computed from. Views of a parameter stay views, and lookups in a table stay lookups.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxmerge.capture import biased_products
from fxmerge.graph.ops import in_place, overload_name
from fxmerge.ir.capture import FOLDED
from fxmerge.rules import movement
from fxmerge.rules.lookup import name_of, rule_of
from fxmerge.rules.products import STACKED
from fxmerge.rules.rule import Rule
from fxmerge.weights.by_path import at
from fxmerge.weights.stored_tensor import beside

_Folded = tuple[str, tuple[str, ...]]  # (path of a new parameter, paths of the tensors that it was computed from)
_RANDOM = ("dropout", "rrelu", "stochastic_depth", "new")  # rules whose ops may return other values in each run
_TABLES = ("embedding", "embedding_bag")  # rules whose ops look up rows, which is not arithmetic


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """Folds the constant subgraphs of a graph module, in place, and deletes the parameters that are then unused.

    Raises nothing: what cannot be computed stays in the graph.
    """
    _linear_for_transposed(module)
    biased_products.split(module)
    constant: dict[fx.Node, bool] = {}  # node that depends on parameters alone -> whether arithmetic is involved
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
                    return module  # the constant would differ from run to run
            if alone and (update or (found is not None and found.name not in _RANDOM)):
                moves = found is not None and (found.kind in ("movement", "query") or found.name in _TABLES)
                constant[node] = not moves or any(constant[n] for n in _moved(node, found))
    updated = _updated(module, constant, updates) if updates else {}
    if updated is None:
        return module
    constant.update(dict.fromkeys(updated, True))
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    folded: dict[str, _Folded] = {}  # text of a constant subgraph -> the parameter that replaces it
    for node, computed in list(constant.items()):
        outside = [u for u in node.users if u not in constant]
        if node.op == "get_attr" or not outside:
            continue
        weighs = [u for u in outside if _is_weight(module, u, node) and not _turned(module, u, node)]
        if computed or weighs:
            users = outside if computed else weighs
            _replace(module, node, users, as_weight=bool(weighs), folded=folded, updated=updated)
    if folded:
        kept = any(u not in constant for node in updated for u in node.users)
        for node in reversed(constant):
            if not node.users and not (kept and node in updated):
                module.graph.erase_node(node)
        _drop_unused(module, used)
        module.recompile()
    return module


def _moved(node: fx.Node, rule: Rule | None) -> list[fx.Node]:
    """The inputs whose values an op that moves entries returns: of a lookup the table, not the places."""
    if rule is None or rule.name not in _TABLES:
        return node.all_input_nodes
    table = node.kwargs.get("weight", node.args[0 if overload_name(node.target) else 1] if node.args else None)
    return [table] if isinstance(table, fx.Node) else node.all_input_nodes


def _updated(
    module: fx.GraphModule, constant: dict[fx.Node, bool], updates: list[fx.Node]
) -> dict[fx.Node, Any] | None:
    """The constants that share memory with one updated in place, with their values after the last update.

    None where these are not the values that every reader sees: a parameter itself is written, or there is a read
    before the last update.
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
                values[node] = _value(module, node, values.__getitem__)
        found = {node: value for node, value in values.items() if memory(value) in last}
    except (TypeError, RuntimeError, ValueError, IndexError):
        return None
    read = [(user, value) for node, value in found.items() for user in node.users if user not in constant]
    return None if any(place[user] < last[memory(value)] for user, value in read) else found


def _repeatable(target: Any) -> bool:
    """Returns whether an in-place op does the same in each run: only torch's ops that are not random."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "").split(".")[0]
    packet = getattr(torch.ops.aten, name, None)
    random = torch.Tag.nondeterministic_seeded
    if packet is None:
        return target is operator.setitem
    return not any(random in getattr(packet, overload).tags for overload in packet.overloads())


def _value(module: fx.GraphModule, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """The value of a node of a constant subgraph, given a function for the values of its inputs."""
    if node.op == "get_attr":
        return at(module, str(node.target))
    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    target: Any = node.target
    return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def _linear_for_transposed(module: fx.GraphModule) -> None:
    """Rewrites x @ w.t() as F.linear(x, w), and F.linear(x, w.t(), b) as x @ w + b, in place.

    The layer then uses the parameter w itself, whatever op transposes it. If w.t() were folded to a new parameter, the
    layer would no longer share w with the others that use it.
    """
    calls, changed = ("call_function", "call_method"), False
    for node in list(module.graph.nodes):
        found = rule_of(node, module) if node.op in calls else None
        name = found.name if found is not None else ""
        if name not in ("matmul", "linear") or not 2 <= len(node.args) + len(node.kwargs) <= 3:
            continue
        transposed = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        weight = _transposed(module, transposed)
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
        if not transposed.users:
            module.graph.erase_node(transposed)
        changed = True
    if changed:
        module.graph.lint()
        module.recompile()


def _transposed(module: fx.GraphModule, transposed: Any) -> fx.Node | None:
    """The get_attr node of the parameter that a node is the transpose of, or None."""
    if not isinstance(transposed, fx.Node) or transposed.op not in ("call_function", "call_method"):
        return None
    row = rule_of(transposed, module)
    if len(transposed.all_input_nodes) != 1 or row is None or row.kind not in ("movement", "query"):
        return None
    (weight,) = transposed.all_input_nodes
    value = at(module, str(weight.target)) if weight.op == "get_attr" else None
    if not isinstance(value, Tensor) or value.dim() != 2:
        return None
    places = torch.arange(value.numel()).view(value.shape)
    moved = movement.run(transposed.target, (places, *transposed.args[1:]), transposed.kwargs)
    return weight if isinstance(moved, Tensor) and torch.equal(moved, places.t()) else None


def _is_weight(module: fx.GraphModule, user: fx.Node, node: fx.Node) -> bool:
    """Returns whether `node` is the weight or bias of the layer `user`, and not its input."""
    if user.op not in ("call_function", "call_method"):
        return False
    found = rule_of(user, module)
    return found is not None and found.kind in ("producer", "per_channel_param") and node not in user.args[:1]


def _turned(module: fx.GraphModule, user: fx.Node, node: fx.Node) -> bool:
    """Returns whether a layer of stacked experts takes its matrices transposed, which its rule knows."""
    row = rule_of(node, module)
    return name_of(rule_of(user, module)) in STACKED and name_of(row) in ("transpose", "permute")


def _text(value: Any, updated: Container[fx.Node]) -> str:
    """A constant subgraph as text; equal texts mean equal values."""
    if isinstance(value, fx.Node):
        if value in updated:
            return value.name
        if value.op == "get_attr":
            return f"self.{value.target}"
        called = value.target if isinstance(value.target, str) else id(value.target)
        return f"{called}({_text(value.args, updated)}, {_text(value.kwargs, updated)})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_text(v, updated) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_text(v, updated)}' for k, v in value.items())}}}"
    return repr(value)


def _replace(
    module: fx.GraphModule, node: fx.Node, users: list[fx.Node], *, as_weight: bool, folded: dict[str, _Folded],
    updated: Mapping[fx.Node, Any],
) -> None:  # fmt: skip
    """Replaces a node by a new parameter for these users. Equal values get the same parameter (see `folded`)."""
    text = _text(node, updated)
    computed = folded.get(text) or _computed(module, node, as_weight, updated)
    if computed is None:
        return
    folded[text] = computed
    path, sources = computed
    with module.graph.inserting_before(node):
        fetched = module.graph.get_attr(path)
    fetched.meta = {**node.meta, FOLDED: sources}
    for user in users:
        user.replace_input_with(node, fetched)


def _computed(module: fx.GraphModule, node: fx.Node, as_weight: bool, updated: Mapping[fx.Node, Any]) -> _Folded | None:
    """A new parameter with the node's value, or None where the node should stay.

    It is a buffer if the value is computed from buffers only.

    as_weight: whether the value is a layer's weight or bias, which is folded whatever its size
    """
    values: dict[fx.Node, Any] = {}
    sources: list[fx.Node] = []

    def value(of: fx.Node) -> Any:
        if of not in values:
            if of.op == "get_attr":
                sources.append(of)
            if of in updated:  # its value is known; its inputs are visited for `sources`
                for source in of.all_input_nodes:
                    value(source)
            values[of] = updated[of] if of in updated else _value(module, of, value)
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
    """Deletes the parameters in `before` that the folded graph no longer uses."""
    after = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = tuple(str(n.target) + "." for n in module.graph.nodes if n.op == "call_module")
    for path in before - after:
        if not path.startswith(called):
            owner, _, name = path.rpartition(".")
            delattr(module.get_submodule(owner), name)
