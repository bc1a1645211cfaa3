"""What reached the traced parts of a model when the user's own code ran on one sample.

Paired runs, and all that is computed from them, take such a run as one batch of a recorded graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from torch import Tensor

from fxmerge.graph.nested import fresh, tree
from fxmerge.ir.labels import thin


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleRun(Sequence[Any]):
    """One run of the user's own code, as a batch whose entries are the example's values of the placeholders.

    inputs:    the values of the placeholders for the example inputs, by which the cost of a run is counted
    idle:      the nodes of the user's own code that no graph runs: those between parts whose channels no layer reads
    ends:      the nodes that idle nodes, or the output, read: what is compared between two graphs
    given:     the original's values of the idle nodes that other nodes read, by node
    literals:  by node of the user's own code, all leaves of its arguments in this run; sizes differ between samples
    """

    inputs: tuple[Any, ...]
    idle: frozenset[str]
    ends: tuple[str, ...]
    given: Mapping[str, Any]
    literals: Mapping[str, tuple[Any, ...]]

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.inputs[index]

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inputs)

    def value(self, node: str) -> Any:
        """The original's value of an idle node; None if no other node reads it."""
        return fresh(self.given.get(node))

    def with_gradients(self) -> SampleRun:
        """The same run, with a gradient required for the floating-point tensors that it gives."""

        def leaf(value: Any) -> Any:
            floats = isinstance(value, Tensor) and value.is_floating_point()
            return value.detach().clone().requires_grad_() if floats else value

        return replace(self, given={name: tree(leaf, value) for name, value in self.given.items()})


def idle(batches: Sequence[object]) -> frozenset[str]:
    """The idle nodes of the graph that these batches are for; none if it is run as a whole."""
    first = batches[0] if batches else None
    return first.idle if isinstance(first, SampleRun) else frozenset()


def narrowed(value: Any, labels: Tensor, alive: Tensor) -> Any:
    """A tensor without the places along its axes at which no label is alive.

    labels: those of the example's value, whose other axes may have other sizes
    """
    mask = alive[thin(labels)]
    if not isinstance(value, Tensor) or bool(mask.all()):
        return value
    for axis in range(mask.dim()):
        if mask.size(axis) > 1:
            others = [a for a in range(mask.dim()) if a != axis]
            index = (mask.amax(others) if others else mask).nonzero().flatten()
            value, mask = value.index_select(axis, index.to(value.device)), mask.index_select(axis, index)
    return value
