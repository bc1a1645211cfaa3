"""Decisions of a graph, such as which experts a token is sent to, that refit takes over from the original.

A merged graph would send some tokens to other experts than the original does, and the rows of an expert's layer would
be other tokens. On refit's data both graphs therefore choose what the original chooses, each with its own scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fxmerge.ir.provenance import Provenance
from fxmerge.rules.over_axes import Ordered

ROWS_OF = ("index", "index_select")  # rules that take rows by their numbers


def decisions(module: fx.GraphModule, facts: Provenance) -> frozenset[str]:
    """The nodes that choose experts (topk), by name."""
    named = {node.name: node for node in module.graph.nodes}
    seen: set[fx.Node] = set()
    todo = [named[stack.key] for stack in facts.stacks if stack.key in named]
    found = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if facts.rules.get(node.name) == "topk" or facts.kinds.get(node.name) == "unknown":
            found.add(node.name)
        else:
            todo += node.all_input_nodes
    return frozenset(name for name in found if _is_topk(named[name]))


def _is_topk(node: fx.Node) -> bool:
    return "topk" in str(node.target)


def as_decided(node: fx.Node, scores: Tensor, chosen: Any) -> Any:
    """The scores (values, indices) at the places that the original has chosen."""
    given = dict(zip(("input", "k", "dim"), node.args, strict=False)) | dict(node.kwargs)
    indices = chosen[1]
    axis: Any = given.get("dim", -1)
    return Ordered(scores.gather(axis, indices), indices)


def rows_of(node: fx.Node, facts: Provenance) -> fx.Node | None:
    """The node that tells which position each row of a routed layer's input is; None where it is not known."""
    at: fx.Node | None = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    while at is not None and facts.rules.get(at.name) not in ROWS_OF:
        at = at.args[0] if at.args and isinstance(at.args[0], fx.Node) else None
    if at is None:
        return None
    index: Any = at.args[-1]
    index = index[0] if isinstance(index, Sequence) and len(index) == 1 else index
    return index if isinstance(index, fx.Node) else None
