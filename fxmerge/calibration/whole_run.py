"""A run of the original whose values are all kept, and what the outputs lose with other values at some nodes.

Only the nodes that depend on these are run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.batches import batch_size
from fxmerge.calibration.epilogue import pair
from fxmerge.calibration.live import ends, last_readers
from fxmerge.calibration.output_error import difference, relative
from fxmerge.calibration.paired_run import PairedRun, Settings
from fxmerge.graph.ops import updates
from fxmerge.graph.outputs import returned
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance

SAMPLES, ELEMENTS = 256, 2**27  # samples, and elements of all their activations together, at most

# (values of the nodes that were run again in this batch, number of the batch) -> the value of a node
Change = Callable[[Mapping[str, Any], int], Any]


def affordable(captured: Capture, count: int, flops: Mapping[str, int], budget: float) -> int:
    """The number of samples on which the original can run once, and half of it `count` times more; at least one.

    flops:  of each node of the original
    budget: FLOPs of all runs together
    """
    size = max(batch_size(captured), 1)
    whole, elements = sum(flops.values()) / size, sum(torch.Size(s).numel() for s in captured.shapes.values()) // size
    return max(1, min(SAMPLES, ELEMENTS // max(elements, 1), int(budget / max(whole * (1 + count / 2), 1))))


class WholeRun:
    """One run of the original whose values are all kept."""

    def __init__(
        self, captured: Capture, facts: Provenance, batches: Sequence[Sequence[Any]], settings: Settings
    ) -> None:
        self.module, self.facts = captured.module, facts
        self.paired = PairedRun(pair(captured.module, facts), batches, settings)
        self.nodes: list[fx.Node] = list(captured.module.graph.nodes)
        self.ends = ends(last_readers(self.nodes))

    def run(self, at: Callable[[fx.Node], None] = lambda node: None) -> None:
        """Runs the original; at: is called at each node that has been run."""
        values = self.paired.merged.values
        for node in self.nodes:
            first = self._updated(node)
            before = values.get(first.name) if first is not None else None
            if before is not None and first is not None:
                values[first.name] = [_copied(value) for value in before]
            self.paired.advance(node)
            if before is not None and first is not None:
                values[first.name] = before
            at(node)

    def loss(self, changes: Mapping[str, Change]) -> float:
        """The relative square error of the model's outputs with other values of some nodes, as in `output_error`."""
        output = self.nodes[-1]
        sums: dict[int, Tensor] = {}
        for number in range(len(self.paired.original.batches)):
            known = self._known(changes, number)
            pairs = zip(
                returned(self.paired.merged.call(output, number)),
                returned(self.paired.merged.call(output, number, known)),
                strict=True,
            )
            for place, (y, z) in enumerate(pairs):
                own = difference(self.paired, number, y, z)
                sums[place] = sums[place] + own if place in sums else own
        return relative(list(sums.values()), self.paired.reduce)

    def again(self, node: fx.Node, given: Mapping[str, Any], number: int) -> Any:
        """The value of a node in one batch with these values of its operands."""
        return self.paired.shifted(node, self.paired.again(node, given, number))

    def value(self, name: str, given: Mapping[str, Any], number: int) -> Any:
        """The value of a node in one batch: the given one, or that of the original."""
        return given[name] if name in given else self.paired.merged.values[name][number]

    def _known(self, changes: Mapping[str, Change], number: int) -> dict[str, Any]:
        """The values of the nodes that change, in one batch, as far as the output reads them."""
        known: dict[str, Any] = {}
        for node in self.nodes[:-1]:
            if node.name in changes:
                known[node.name] = changes[node.name](known, number)
            elif any(n.name in known for n in node.all_input_nodes):
                first, given = self._updated(node), known
                if first is not None and first.name not in known:
                    given = known | {first.name: _copied(self.paired.merged.values[first.name][number])}
                known[node.name] = self.again(node, given, number)
            for name in self.ends.get(node.name, ()):
                known.pop(name, None)
        return known

    def _updated(self, node: fx.Node) -> fx.Node | None:
        """The operand that a node updates in place."""
        first = node.args[0] if node.args and updates(self.module, node) else None
        return first if isinstance(first, fx.Node) else None


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
