"""Which expert computes each row of an activation: the node whose values say so.

Rows sorted by expert are told apart by offsets, which are counted from the experts' sorted numbers; a table of biases
is indexed by these numbers. Both are the same routing.
"""

from __future__ import annotations

import operator

from torch import fx

from fxmerge.graph.ops import in_place, plain_name

_PASSING = ("to", "_to_copy", "clone", "contiguous", "detach", "int", "long", "float", "type_as")


def routing(node: fx.Node) -> str:
    """The name of the node that holds the numbers of the experts, given that of the numbers or of offsets."""
    numbers = _without_casts(node)
    counts = _without_casts(_first(numbers)) if plain_name(numbers) == "cumsum" else None
    if counts is not None and plain_name(counts) == "histc":
        counted = _without_casts(_first(counts))
        if counted is not None and _ascending(counted) and _whole(counts):
            return counted.name
    return numbers.name if numbers is not None else node.name


def _ascending(node: fx.Node) -> bool:
    """Are these the values of a sort, in ascending order, which nothing changes later?"""
    if node.target is not operator.getitem or node.args[1] != 0 or any(in_place(u, u.target) for u in node.users):
        return False
    ordered = _first(node)
    if ordered is None or plain_name(ordered) != "sort" or ordered.kwargs.get("descending"):
        return False
    return not any(given is True for given in ordered.args[1:])


def _first(node: fx.Node | None) -> fx.Node | None:
    given = node.args[0] if node is not None and node.args else None
    return given if isinstance(given, fx.Node) else None


def _without_casts(node: fx.Node | None) -> fx.Node | None:
    while plain_name(node) in _PASSING and _first(node) is not None:
        node = _first(node)
    return node


def _whole(counts: fx.Node) -> bool:
    """Does a histogram have one bin for each of 0, 1, ..., bins - 1?"""
    names = ("input", "bins", "min", "max")
    given = dict(zip(names, counts.args, strict=False)) | dict(counts.kwargs)
    bins = given.get("bins")
    return isinstance(bins, int) and (given.get("min"), given.get("max")) == (0, bins - 1)
