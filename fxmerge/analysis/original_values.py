"""Values that a graph computes from sizes, such as the scale of attention, keep what they were before a merge.

`x.size(-1) ** -0.5` follows the size of x. As a size (an argument of `view`) it must follow; as a value (a factor) it
must not, since the narrower model has to compute the function of the original. Such a value is computed from the
original widths again, as literals, and from all other sizes as they are: in `(x.size(-1) * x.size(1)) ** -0.5` the
width becomes a number, while the length remains that of the input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.analysis.kept_values import plain
from fxmerge.graph import nested
from fxmerge.graph.ops import overload_name
from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules import movement
from fxmerge.rules.lookup import rule_of_target
from fxmerge.rules.resize import Call

# op that makes a tensor -> the argument that holds its values, by position and name; the others are sizes
_VALUES: dict[str, tuple[int, str]] = {
    "full": (1, "fill_value"),
    "new_full": (2, "fill_value"),
    "new_tensor": (1, "data"),
    "tensor": (0, "data"),
    "as_tensor": (0, "data"),
    "scalar_tensor": (0, "s"),
}


class StuckError(Exception):
    """The original value cannot be computed in the merged graph."""


@dataclass(frozen=True)
class Originals:
    """The values of a graph's nodes before a merge (`was`) and after it (`now`), by name.

    changed: has the value of a node changed?
    """

    was: Callable[[str], Any]
    now: Callable[[str], Any]
    changed: Callable[[str], bool]

    def of_query(self, node: fx.Node) -> Call:
        """The call of a node that computes a plain value; what it takes as values is as before. Raises StuckError."""
        args, kwargs = tuple(node.args), dict(node.kwargs)
        name = node.target if isinstance(node.target, str) else overload_name(node.target)
        known = _VALUES.get(str(name or getattr(node.target, "__name__", "")))
        if known is not None:
            position, keyword = known
            if len(args) > position:
                args = (*args[:position], nested.tree(self.kept, args[position]), *args[position + 1 :])
            elif keyword in kwargs:
                kwargs[keyword] = nested.tree(self.kept, kwargs[keyword])
            return Call(node.target, args, kwargs)
        operands = [self.was(n.name) for n in node.all_input_nodes]
        computes = isinstance(self.was(node.name), Tensor) and any(isinstance(v, Tensor) for v in operands)
        rule = rule_of_target(node.target)
        if computes and not (rule is not None and rule.kind in ("movement", "query")):  # a sum, not a view or an index
            args, kwargs = nested.tree(self.number, args), nested.tree(self.number, kwargs)
        return Call(node.target, args, kwargs)

    def of_operands(self, node: fx.Node) -> Call:
        """The call of a node that takes activations, with its plain operands as before. Raises StuckError."""
        args, kwargs = tuple(node.args), dict(node.kwargs)
        return Call(node.target, nested.tree(self.operand, args), nested.tree(self.operand, kwargs))

    def number(self, leaf: Any) -> Any:
        return self.kept(leaf) if self.has_changed(leaf, int, float) else leaf

    def operand(self, leaf: Any) -> Any:
        if self.has_changed(leaf, Tensor):
            old, new = self.was(leaf.name), self.now(leaf.name)
            if old.shape != new.shape:  # zeros of a new size stay zeros
                values = torch.cat([old.flatten(), new.flatten()])
                if not bool((values == values[:1]).all()):
                    raise StuckError
                return leaf
            return leaf if torch.equal(old, new) else self.kept(leaf)
        return self.number(leaf)

    def has_changed(self, leaf: Any, *kinds: type) -> bool:
        """Is this a node whose plain value of one of some types has changed?"""
        return isinstance(leaf, fx.Node) and self.changed(leaf.name) and isinstance(self.was(leaf.name), kinds)

    def kept(self, leaf: Any) -> Any:
        """What computes the value that a node had before: the node, a literal, or a call of such. Raises StuckError."""
        if not isinstance(leaf, fx.Node) or not self.changed(leaf.name):
            return leaf
        if isinstance(self.was(leaf.name), (Lab, Param)):  # which gives a new tensor its dtype
            return leaf
        if same(self.now(leaf.name), self.was(leaf.name)):
            return leaf
        found = self._computed(leaf)
        if not same(nested.tree(self.evaluated, found), self.was(leaf.name)):
            raise StuckError
        return found

    def _computed(self, node: fx.Node) -> Any:
        old, new = self.was(node.name), self.now(node.name)
        sources = [n for n in node.all_input_nodes if self.changed(n.name)]
        read = [n for n in sources if isinstance(self.was(n.name), (Lab, Param))]
        if isinstance(old, tuple) and read:  # a shape: widths become literals
            sizes = enumerate(zip(old, new, strict=True))
            return tuple(was if was != now else Call(operator.getitem, (node, at), {}) for at, (was, now) in sizes)
        if (read and not isinstance(old, Tensor)) or (
            node.target is operator.getitem and isinstance(old, (int, float))
        ):
            counts = node.target in ("numel", torch.numel) and any(isinstance(self.was(n.name), Lab) for n in read)
            if counts or not isinstance(old, (int, float)):
                raise StuckError  # the number of elements holds sizes of the input too
            return old
        return Call(node.target, nested.tree(self.kept, tuple(node.args)), nested.tree(self.kept, dict(node.kwargs)))

    def evaluated(self, value: Any) -> Any:
        """The value of an expression in the merged graph. Raises StuckError if it cannot be computed."""
        if isinstance(value, fx.Node):
            return self.now(value.name)
        if isinstance(value, Call):
            args, kwargs = (nested.tree(self.evaluated, v) for v in (tuple(value.args), dict(value.kwargs)))
            try:
                return computed(value.target, args, kwargs)
            except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
                raise StuckError from error
        return value


def computed(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A plain value that a graph computes, run on plain values, labels and parameters."""
    if isinstance(target, str) and target.startswith("new_"):  # takes only its dtype from its operand
        args = (torch.empty(()), *args[1:])
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    return movement.run(target, *plain(args, kwargs))


def sources(node: fx.Node, values: Callable[[str], Any]) -> list[fx.Node]:
    """The activations and parameters from whose sizes a plain value was computed."""
    found: list[fx.Node] = []
    waiting, known = [node], set[str]()
    while waiting:
        one = waiting.pop()
        if one.name in known:
            continue
        known.add(one.name)
        if isinstance(values(one.name), (Lab, Param)):
            found.append(one)
        else:
            waiting += one.all_input_nodes
    return found


def same(one: Any, other: Any) -> bool:
    """Are two plain values equal?"""
    a, b = nested.leaves(one), nested.leaves(other)
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y
        for x, y in zip(a, b, strict=True)
    )
