"""Folding: what a graph computes from parameters alone is computed once, and becomes a parameter itself.

A bias that is joined from pieces (q, 0, v), a weight that is standardised before each use, `1 + weight`: such values
do not depend on the input, and a layer whose weight is a parameter can be merged where one whose weight is computed
cannot. Folded is only what must be: the computed weight or bias of a layer, and arithmetic whose result is no larger
than the parameters it is made of. Views of a parameter stay views; a table that is gathered from stays a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from . import rules
from .weights import at

_RANDOM = ("dropout", "rrelu", "stochastic_depth", "new")


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """The graph module, changed in place: constant subgraphs are folded, and parameters that nothing uses then go.

    Raises nothing: what cannot be computed is left as it stands.
    """
    known = rules.table()
    constant: dict[fx.Node, bool] = {}  # node that depends on parameters alone -> is there arithmetic in it?
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constant[node] = False
        elif node.op in ("call_function", "call_method") and node.all_input_nodes:
            found = rules.find(node.target, known)
            plain = found is not None and found[0].name not in _RANDOM and found[0].kind != "unknown"
            if plain and found is not None and all(n in constant for n in node.all_input_nodes):
                moves = found[0].kind == "movement"
                constant[node] = not moves or any(constant[n] for n in node.all_input_nodes)
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    changed = False
    for node, computed in list(constant.items()):
        outside = [u for u in node.users if u not in constant]
        if node.op == "get_attr" or not outside:
            continue
        weighs = [u for u in outside if _as_weight(module, u, node, known)]
        if (computed or weighs) and _replace(module, node, weighs if not computed else outside, bool(weighs)):
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
        _drop_unused(module, used)
        module.recompile()
    return module


def _as_weight(module: fx.GraphModule, user: fx.Node, node: fx.Node, known: dict[Any, Any]) -> bool:
    """Is the node the weight or bias of this layer, and not its input?"""
    if user.op not in ("call_function", "call_method"):
        return False
    found = rules.find(user.target, known)
    return found is not None and found[0].kind in ("writer", "carrier") and node not in user.args[:1]


def _replace(module: fx.GraphModule, node: fx.Node, users: list[fx.Node], as_weight: bool) -> bool:
    """Put a new parameter in the place of the node, for these users."""
    values: dict[fx.Node, Any] = {}
    sources: list[fx.Node] = []

    def value(of: fx.Node) -> Any:
        if of not in values:
            if of.op == "get_attr":
                sources.append(of)
                values[of] = at(module, str(of.target))
            else:
                args, kwargs = fx.map_arg(of.args, value), fx.map_arg(of.kwargs, value)
                target: Any = of.target
                values[of] = (
                    getattr(args[0], target)(*args[1:], **kwargs) if of.op == "call_method" else target(*args, **kwargs)
                )
        return values[of]

    try:
        with torch.no_grad():
            made = value(node)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    held = [values[s] for s in sources]
    if not isinstance(made, Tensor) or not made.is_floating_point() or not all(isinstance(h, Tensor) for h in held):
        return False
    trained = [h for h in held if isinstance(h, nn.Parameter)]
    if not trained or (not as_weight and made.numel() > sum(h.numel() for h in held)):
        return False
    first = next(s for s, h in zip(sources, held, strict=True) if isinstance(h, nn.Parameter))
    owner, _, name = str(first.target).rpartition(".")
    holder, path = module.get_submodule(owner), name + "_folded"
    while hasattr(holder, path):
        path += "_"
    grad = any(h.requires_grad for h in trained)
    holder.register_parameter(path, nn.Parameter(made.detach().clone().contiguous(), requires_grad=grad))
    with module.graph.inserting_before(node):
        fetched = module.graph.get_attr(f"{owner}.{path}".lstrip("."))
    fetched.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, fetched)
    return True


def _drop_unused(module: fx.GraphModule, before: set[str]) -> None:
    """Delete the parameters that the folded graph no longer fetches, and modules that are empty then."""
    after = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = tuple(str(n.target) + "." for n in module.graph.nodes if n.op == "call_module")
    for path in before - after:
        if not path.startswith(called):
            owner, _, name = path.rpartition(".")
            delattr(module.get_submodule(owner), name)
