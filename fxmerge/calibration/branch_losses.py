"""What the model's outputs lose without one of its residual branches: the branch's mean takes its place.

For each branch, the rest of the graph after its add runs once more, on a few of refit's samples. It reads what the
original computed before the add. (SLEB removes blocks of language models by the loss of the outputs likewise: Song et
al., "SLEB: streamlining LLMs through redundancy verification and elimination of transformer blocks", ICML 2024,
section 3.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.batches import batch_size
from fxmerge.calibration.epilogue import pair
from fxmerge.calibration.output_error import difference, relative
from fxmerge.calibration.paired_run import PairedRun, Settings, moments
from fxmerge.calibration.trial_runs import first_samples
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.ops import in_place
from fxmerge.graph.outputs import returned
from fxmerge.ir.branches import Branch, Measured
from fxmerge.ir.capture import Capture
from fxmerge.ir.labels import varying
from fxmerge.ir.provenance import Provenance
from fxmerge.progress import Stage, silent
from fxmerge.weights.by_path import at

BUDGET = 1e13  # FLOPs of all runs together, at most; at least one sample
SAMPLES, ELEMENTS = 256, 2**27  # samples, and elements of all their activations together, at most


def measured(
    captured: Capture,
    facts: Provenance,
    branches: Sequence[Branch],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
    *,
    flops: Mapping[str, int],
    means: bool = True,
    stage: Stage = silent,
) -> tuple[Measured, ...]:
    """The branches with their costs and losses, in the same order.

    flops: of each node of the original
    means: whether the mean of a branch may take its place; otherwise nothing does
    """
    if not branches:
        return ()
    some = first_samples(captured, batches, _affordable(captured, len(branches), flops))
    with evaluating(captured.module), torch.no_grad():
        losses = _Losses(captured, facts, some, settings, means)
        without = losses.without(branches)
        stage("branches")
        losses.run()
        found = []
        for branch, start in zip(branches, without, strict=True):
            stage(f"branch {branch.name}")
            found.append(
                Measured(
                    branch=branch,
                    level=start.level,
                    loss=losses.loss(start),
                    parameters=_parameters(captured, branch),
                    flops=sum(flops.get(name, 0) for name in branch.nodes),
                )
            )
    return tuple(found)


def _affordable(captured: Capture, count: int, flops: Mapping[str, int]) -> int:
    """The number of samples on which the original can run once, and half of it once for each of `count` branches."""
    size = max(batch_size(captured), 1)
    whole, elements = sum(flops.values()) / size, sum(torch.Size(s).numel() for s in captured.shapes.values()) // size
    return max(1, min(SAMPLES, ELEMENTS // max(elements, 1), int(BUDGET / max(whole * (1 + count / 2), 1))))


def _parameters(captured: Capture, branch: Branch) -> int:
    """The elements of the parameters that only the branch uses."""
    own, used = set(branch.nodes), dict[bool, dict[int, Tensor]]()
    for node in captured.module.graph.nodes:
        target, held = str(node.target), used.setdefault(node.name in own, {})
        if node.op == "call_module":
            held |= {id(p): p for p in captured.module.get_submodule(target).parameters()}
        elif node.op == "get_attr" and isinstance(value := at(captured.module, target), torch.nn.Parameter):
            held[id(value)] = value
    return sum(p.numel() for key, p in used[True].items() if key not in used[False])


@dataclass
class _Start:
    """A branch, the mean of its outputs, and by batch what the add gives when the mean takes their place."""

    branch: Branch
    level: Tensor | None = None
    values: tuple[Tensor, ...] = ()


class _Losses:
    """One run of the original whose values are all kept, and runs of what follows an add on other values."""

    def __init__(
        self, captured: Capture, facts: Provenance, batches: Sequence[Sequence[Any]], settings: Settings, means: bool
    ) -> None:
        self.module, self.facts, self.means = captured.module, facts, means
        self.paired = PairedRun(pair(captured.module, facts), batches, settings)
        self.nodes: list[fx.Node] = list(captured.module.graph.nodes)
        self.starts: dict[str, list[_Start]] = {}  # by the node of the add

    def without(self, branches: Sequence[Branch]) -> list[_Start]:
        """Plans to leave each of these branches out."""
        found = [_Start(branch) for branch in branches]
        for start in found:
            self.starts.setdefault(start.branch.add, []).append(start)
        return found

    def run(self) -> None:
        """Runs the original."""
        values = self.paired.merged.values
        for node in self.nodes:
            first = self._updated(node)
            before = values.get(first.name) if first is not None else None
            if before is not None and first is not None:
                values[first.name] = [_copied(value) for value in before]
            self.paired.advance(node)
            if before is not None and first is not None:
                values[first.name] = before
            for start in self.starts.get(node.name, ()):
                self._begin(start, values[node.name], values[start.branch.end])

    def _begin(self, start: _Start, sums: Sequence[Tensor], ends: Sequence[Tensor]) -> None:
        """Puts the mean of a branch in its place."""
        rest = [total - end for total, end in zip(sums, ends, strict=True)]
        labels = self.facts.labels.get(start.branch.add)
        axes = varying(labels) if labels is not None and labels.dim() == rest[0].dim() else ()
        if len(axes) == 1 and self.means:
            own = self.paired.unpadded(start.branch.end, ends)
            along = axes[0] - ends[0].dim() + own[0].dim()
            mean = moments(own, along, self.paired.reduce)[0].to(rest[0].dtype)
            level = mean.view(-1, *[1] * (rest[0].dim() - 1 - axes[0]))
            if bool(level.any()):
                start.level, rest = level, [value + level for value in rest]
        start.values = tuple(rest)

    def loss(self, start: _Start) -> float:
        """The relative square error of the model's outputs without a branch."""
        output = self.nodes[-1]
        sums: dict[int, Tensor] = {}
        for number, value in enumerate(start.values):
            known = self._after(start.branch.add, value, number)
            pairs = zip(
                returned(self.paired.merged.call(output, number)),
                returned(self.paired.merged.call(output, number, known)),
                strict=True,
            )
            for place, (y, z) in enumerate(pairs):
                own = difference(self.paired, number, y, z)
                sums[place] = sums[place] + own if place in sums else own
        start.values = ()
        return relative(list(sums.values()), self.paired.reduce)

    def _after(self, add: str, value: Tensor, number: int) -> dict[str, Any]:
        """The values of the nodes that depend on an add, for another value of it, in one batch."""
        known: dict[str, Any] = {add: value}
        for node in self.nodes:
            if node.op == "output" or node.name in known or not any(n.name in known for n in node.all_input_nodes):
                continue
            first, given = self._updated(node), known
            if first is not None and first.name not in known:
                given = known | {first.name: _copied(self.paired.merged.values[first.name][number])}
            known[node.name] = self.paired.shifted(node, self.paired.again(node, given, number))
        return known

    def _updated(self, node: fx.Node) -> fx.Node | None:
        """The operand that a node updates in place."""
        if node.op not in ("call_module", "call_function", "call_method") or not node.args:
            return None
        target = self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        first = node.args[0]
        return first if isinstance(first, fx.Node) and in_place(node, target) else None


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
