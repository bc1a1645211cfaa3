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

from fxmerge.calibration.paired_run import Settings, moments
from fxmerge.calibration.trial_runs import first_samples
from fxmerge.calibration.whole_run import WholeRun, affordable
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.branches import Branch, Measured
from fxmerge.ir.capture import Capture
from fxmerge.ir.labels import varying
from fxmerge.ir.provenance import Provenance
from fxmerge.progress import Stage, silent
from fxmerge.weights.by_path import at

BUDGET = 1e13  # FLOPs of all runs together, at most; at least one sample


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
    some = first_samples(captured, batches, affordable(captured, len(branches), flops, BUDGET))
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
    """Runs without branches."""

    def __init__(
        self, captured: Capture, facts: Provenance, batches: Sequence[Sequence[Any]], settings: Settings, means: bool
    ) -> None:
        self.whole, self.facts, self.means = WholeRun(captured, facts, batches, settings), facts, means
        self.starts: dict[str, list[_Start]] = {}  # by the node of the add

    def without(self, branches: Sequence[Branch]) -> list[_Start]:
        """Plans to leave each of these branches out."""
        found = [_Start(branch) for branch in branches]
        for start in found:
            self.starts.setdefault(start.branch.add, []).append(start)
        return found

    def run(self) -> None:
        """Runs the original."""
        values = self.whole.paired.merged.values

        def begin(node: fx.Node) -> None:
            for start in self.starts.get(node.name, ()):
                self._begin(start, values[node.name], values[start.branch.end])

        self.whole.run(begin)

    def _begin(self, start: _Start, sums: Sequence[Tensor], ends: Sequence[Tensor]) -> None:
        """Puts the mean of a branch in its place."""
        rest = [total - end for total, end in zip(sums, ends, strict=True)]
        labels, paired = self.facts.labels.get(start.branch.add), self.whole.paired
        axes = varying(labels) if labels is not None and labels.dim() == rest[0].dim() else ()
        if len(axes) == 1 and self.means:
            own = paired.unpadded(start.branch.end, ends)
            along = axes[0] - ends[0].dim() + own[0].dim()
            mean = moments(own, along, paired.reduce)[0].to(rest[0].dtype)
            level = mean.view(-1, *[1] * (rest[0].dim() - 1 - axes[0]))
            if bool(level.any()):
                start.level, rest = level, [value + level for value in rest]
        start.values = tuple(rest)

    def loss(self, start: _Start) -> float:
        """The relative square error of the model's outputs without a branch."""
        found = self.whole.loss({start.branch.add: lambda given, number: start.values[number]})
        start.values = ()
        return found
