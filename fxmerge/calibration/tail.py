"""The tail of a graph: its last layers and what follows them, whose values need not be stored.

The outputs of a language model's head are many times as large as all activations before it, and few nodes read them. In
a paired run they are therefore computed again, batch by batch, whenever they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, overload

import torch
from torch import fx

from fxmerge.graph.ops import updates

LARGE = 2**24  # elements over all batches, above which values are computed again


def tail(module: fx.GraphModule, layers: Container[str]) -> frozenset[str]:
    """The nodes that no layer depends on, and that depend on a layer or are one; none if one of them is in place.

    layers: the nodes that are layers
    """
    found: set[fx.Node] = set()
    ahead: set[fx.Node] = set()  # nodes that a layer depends on
    for node in reversed(module.graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        if not any(user in ahead or user.name in layers for user in node.users):
            if updates(module, node):
                return frozenset()
            found.add(node)
        else:
            ahead.add(node)
    after: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node in found and (node.name in layers or any(source in after for source in node.all_input_nodes)):
            after.add(node)
    return frozenset(node.name for node in after)


class Recomputed(Sequence[Any]):
    """The values of a node by batch, each computed when it is read. The last one that was read is stored.

    likes: by number of the batch, tensors like the values that have been computed, without their entries
    """

    def __init__(self, of: Callable[[int], Any], numbers: range, likes: dict[int, Any] | None = None) -> None:
        self.of, self.numbers = of, numbers
        self.likes: dict[int, Any] = {} if likes is None else likes
        self.last: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Any]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return Recomputed(self.of, self.numbers[at], self.likes)
        number = self.numbers[at]
        if self.last is None or self.last[0] != number:
            self.last = None  # freed before the next one is computed
            with torch.no_grad():
                self.last = number, self.of(number)
            self.likes[number] = _like(self.last[1])
        return self.last[1]

    def like(self, at: int) -> Any:
        """A tensor like a value, without its entries. It is computed if that has not been done before."""
        if self.numbers[at] not in self.likes:
            self[at]
        return self.likes[self.numbers[at]]

    def forget(self) -> None:
        """Compute the next value again, whichever it is."""
        self.last = None

    def __iter__(self) -> Iterator[Any]:
        return (self[at] for at in range(len(self)))


def shaped(values: Sequence[Any]) -> list[Any]:
    """Tensors of the shapes and dtypes of a node's values; the values themselves, if they are stored."""
    return [values.like(at) for at in range(len(values))] if isinstance(values, Recomputed) else list(values)


def _like(value: Any) -> Any:
    return value.new_empty(()).expand(value.shape) if isinstance(value, torch.Tensor) else value
