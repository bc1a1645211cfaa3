"""Assertions on the sizes of inputs, written into a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxmerge.ir.capture import SIZE_CHECK

# no comma outside of brackets: the writer of model.py breaks lines there
REMEDY = "to use other sizes give fxmerge example inputs of these"
NAME = re.compile(r"\bs\d+\b")


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """The sizes from `low` to `high` whose remainder by `step` is that of `low`, if they fulfil `guards` too."""

    low: int
    high: int | None
    step: int = 1
    guards: Sequence[str] = ()


@dataclass(frozen=True)
class Place:
    """An axis of an input whose size is `factor` times a symbol."""

    node: fx.Node
    axis: int
    factor: int = 1


class Writer:
    """Writes assertions after the placeholders of a graph."""

    def __init__(self, graph: fx.Graph, after: fx.Node, first: Mapping[str, Place]) -> None:
        self.graph, self.first = graph, first
        self.before = after.next

    def shape(self, node: fx.Node, shape: Sequence[int | str]) -> None:
        """Asserts the sizes of one input that are numbers, and those that follow from other sizes."""
        names = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        start = names[-1] + 1 if names else 0  # from here on, all sizes are numbers
        said = ", ".join("any" if isinstance(n, str) else str(n) for n in shape) + ("," if len(shape) == 1 else "")
        message = f"input {node.name} must have the shape ({said}); {REMEDY}"

        def whole(x: fx.Proxy) -> Any:
            sizes: Any = x.shape
            return (sizes if start == 0 else sizes[start:]) == tuple(shape[start:])

        if start < len(shape) or not shape:
            self._assert(lambda: whole(fx.Proxy(node)), message)
        for axis, size in enumerate(shape[:start]):
            if isinstance(size, int):
                self._assert(lambda a=axis, n=size: self._size(node, a) == n, message)  # type: ignore[misc]
            elif size not in self._own(node, axis):
                said = f"input {node.name} (axis {axis}) must agree with the other inputs as in the example"
                self.code(f"{node.name}_size == {size}", f"{said}; {REMEDY}", NAME.findall(size), (node, axis))

    def size(self, symbol: str, allowed: Allowed) -> None:
        """Asserts the limits of one symbol, at the first place where it is the size of an input."""
        own = self.first[symbol]
        said, factor = f"input {own.node.name} (axis {own.axis}) must have a size that is ", own.factor
        if factor > 1:  # the limits of its sizes, not of the symbol
            low, high = allowed.low * factor, None if allowed.high is None else allowed.high * factor
            allowed = replace(allowed, low=low, high=high, step=allowed.step * factor)

        def here() -> Any:
            return self._size(own.node, own.axis)

        if allowed.high == allowed.low:
            self._assert(lambda: here() == allowed.low, f"{said}{allowed.low}; {REMEDY}")
            return
        if allowed.low > 1:
            self._assert(lambda: here() >= allowed.low, f"{said}at least {allowed.low}; {REMEDY}")
        if allowed.high is not None:
            self._assert(lambda: here() <= allowed.high, f"{said}at most {allowed.high}; {REMEDY}")
        if allowed.step > 1:
            rest = allowed.low % allowed.step
            what = f"a multiple of {allowed.step}" + (f" plus {rest}" if rest else "")
            self._assert(lambda: here() % allowed.step == rest, f"{said}{what}; {REMEDY}")
        for guard in allowed.guards:
            self.code(guard, f"{said}an {symbol} for which {guard}; {REMEDY}", [symbol])

    def code(self, text: str, message: str, names: Sequence[str], size: tuple[fx.Node, int] | None = None) -> None:
        """Asserts a condition that is written as code in symbols.

        size: an input and the axis whose size the code calls `NAME_size`
        """

        def condition() -> Any:
            known = {}
            for name in names:
                own = self.first[name]
                size_here = self._size(own.node, own.axis)
                known[name] = size_here // own.factor if own.factor > 1 else size_here
            if size is not None:
                known[f"{size[0].name}_size"] = self._size(*size)
            return eval(text, {"math": __import__("math"), "torch": torch}, known)

        self._assert(condition, message)

    def _own(self, node: fx.Node, axis: int) -> list[str]:
        """The sizes that a place defines: it is the first one of a symbol."""
        places = [(symbol, p) for symbol, p in self.first.items() if (p.node, p.axis) == (node, axis)]
        return [symbol if p.factor == 1 else f"{p.factor}*{symbol}" for symbol, p in places]

    def _size(self, node: fx.Node, axis: int) -> Any:
        sizes: Any = fx.Proxy(node).shape
        return sizes[axis]

    def _assert(self, condition: Callable[[], Any], message: str) -> None:
        with self.graph.inserting_before(self.before):
            made = condition()
            self.graph.call_function(torch._assert, (made.node, message)).meta[SIZE_CHECK] = True
