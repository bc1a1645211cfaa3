"""Contractions that give scores, sums over channels of two activations: what they take, and where scores go."""

from __future__ import annotations

from collections.abc import Container

from torch import fx
from torch.utils._pytree import tree_leaves

from fxmerge.ir.labels import varying
from fxmerge.ir.provenance import Contraction, Provenance

_NAMES = ("query", "key", "value", "input", "self", "batch1", "batch2", "other", "mat2", "tensor2", "tensors")


def summed_channels(record: Contraction) -> set[str]:
    """The letters of the axes that a contraction sums over, if both operands have channels along one; else none."""
    summed = set(record.letters[0]) & set(record.letters[1]) - set(record.out)
    sides = zip((record.left, record.right), record.letters, strict=True)
    along = [{letters[axis] for axis in varying(t)} for t, letters in sides]
    return summed if along[0] & along[1] & summed else set()


def score_operands(record: Contraction, node: fx.Node, facts: Provenance) -> tuple[fx.Node, fx.Node] | None:
    """The queries and keys of a contraction at `node`; None if it does not give scores of two inputs of the node."""
    given = operands(node, facts)
    if not summed_channels(record) or len(given) < 2:
        return None
    return (given[0], given[1]) if is_attention(node, facts) or len(given) == 2 else None


def is_attention(node: fx.Node, facts: Provenance) -> bool:
    """Does the node compute scores and all that follows from them, up to the sum of the values?"""
    return facts.rules.get(node.name) == "attention"


def operands(node: fx.Node, facts: Provenance) -> list[fx.Node]:
    """The operands of a contraction in the order of its arguments: queries, keys and values, or what is multiplied."""
    given = [*node.args, *(node.kwargs[name] for name in _NAMES if name in node.kwargs)]
    found = [n for n in tree_leaves(given) if isinstance(n, fx.Node)]
    return found[1:] if facts.rules.get(node.name) == "baddbmm" else found


def next_contractions(start: fx.Node, contractions: Container[str]) -> tuple[list[fx.Node], set[fx.Node]]:
    """(the contractions that a node's value reaches first, the nodes that it passes on the way, with the node itself).

    contractions: the names of such nodes
    """
    reached, passed, waiting = list[fx.Node](), {start}, [start]
    while waiting:
        for user in waiting.pop(0).users:
            if user.name in contractions:
                reached += [user] if user not in reached else []
            elif user not in passed:
                passed.add(user)
                waiting.append(user)
    return reached, passed
