"""Which experts of a mixture stay: those without which the mixture's output changes most leave last.

The nodes from the router to the mixture's output run again on a few of refit's samples, each time as if no token could
choose some of the experts: their scores are -inf wherever the router chooses among experts, or normalises over them.
Experts leave in rounds, those first without which the output changes least beside the ones that have left already. (Lu
et al., "Not all experts are equal", ACL 2024, choose experts by the output of their layer likewise.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.paired_run import Settings
from fxmerge.calibration.trial_runs import first_samples
from fxmerge.calibration.whole_run import WholeRun, affordable
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.ops import updates
from fxmerge.graph.outputs import agree
from fxmerge.ir.capture import Capture
from fxmerge.ir.mixtures import Mixture, Thinned
from fxmerge.ir.provenance import Provenance
from fxmerge.progress import Stage, silent

BUDGET = 1e13  # FLOPs of all runs together, at most; at least one sample
TOLERANCE = 1e-3  # relative, within which two outputs of a mixture are the same
ROUNDS = 8  # in which the experts of a mixture leave, if they are more


def thinned(
    captured: Capture,
    facts: Provenance,
    counts: Mapping[str, int],
    mixtures: Sequence[Mixture],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
    *,
    flops: Mapping[str, int],
    stage: Stage = silent,
) -> tuple[Thinned, ...]:
    """Which experts of each mixture stay.

    counts: {mixture: how many of each of its groups}
    flops:  of each node of the original
    """
    runs = max((min(ROUNDS, m.experts - counts[m.name] * m.groups) * m.experts for m in mixtures), default=0)
    some = first_samples(captured, batches, affordable(captured, runs, flops, BUDGET))
    with evaluating(captured.module), torch.no_grad():
        stage("experts")
        whole, found = WholeRun(captured, facts, some, settings), list[Thinned]()
        whole.run()
        for mixture in mixtures:
            stage(f"experts of {mixture.name}")
            run = MaskedRun(captured, mixture, whole)
            kept = _kept(mixture, counts[mixture.name], run.loss)
            found.append(Thinned(mixture.name, mixture.experts, kept, run.loss(kept)))
    return tuple(found)


def losses(
    captured: Capture, facts: Provenance, mixtures: Sequence[Mixture], kept: Mapping[str, Sequence[int]],
    batches: Sequence[Sequence[Any]], settings: Settings, flops: Mapping[str, int],
) -> tuple[Thinned, ...]:  # fmt: skip
    """The mixtures with these experts, as `thinned` returns them."""
    some = first_samples(captured, batches, affordable(captured, 1, flops, BUDGET))
    with evaluating(captured.module), torch.no_grad():
        whole = WholeRun(captured, facts, some, settings)
        whole.run()
        return tuple(
            Thinned(m.name, m.experts, tuple(kept[m.name]), MaskedRun(captured, m, whole).loss(kept[m.name]))
            for m in mixtures
        )


def _kept(mixture: Mixture, count: int, loss: Callable[[Iterable[int]], float]) -> tuple[int, ...]:
    """The experts that stay, `count` in each group."""
    each = mixture.experts // mixture.groups
    left, spare = set(range(mixture.experts)), [each - count] * mixture.groups
    step = -(-sum(spare) // ROUNDS)
    while any(spare):
        free = sorted(e for e in left if spare[e // each])
        found = {e: loss(left - {e}) for e in free}
        for expert in sorted(free, key=lambda e: (found[e], e))[: min(step, sum(spare))]:
            if spare[expert // each]:
                spare[expert // each] -= 1
                left.remove(expert)
    return tuple(sorted(left))


def _without(mixture: Mixture, kept: Iterable[int]) -> Tensor:
    """(experts,) bool: the experts that are not kept."""
    gone = torch.ones(mixture.experts, dtype=torch.bool)
    gone[list(kept)] = False
    return gone


def unlike(
    captured: Capture, fewer: Capture, facts: Provenance, decided: Sequence[tuple[Mixture, Thinned]], settings: Settings
) -> frozenset[str]:
    """The mixtures that, with fewer experts, do not return what they do if no token can choose the others.

    captured, facts: of the whole model
    fewer:           the capture without the experts
    """
    with evaluating(captured.module, fewer.module), torch.no_grad():
        whole, found = WholeRun(captured, facts, [captured.inputs], settings), set[str]()
        whole.run()
        for mixture, one in decided:
            wanted = MaskedRun(captured, mixture, whole).value(_without(mixture, one.kept), 0)
            if not agree([wanted], [MaskedRun(fewer, mixture, whole).value(None, 0)], TOLERANCE):
                found.add(mixture.name)
    return frozenset(found)


class MaskedRun:
    """Runs of one mixture in which some of its experts cannot be chosen."""

    def __init__(self, captured: Capture, mixture: Mixture, whole: WholeRun) -> None:
        self.captured, self.mixture, self.whole = captured, mixture, whole
        named = {node.name: node for node in captured.module.graph.nodes}
        nodes = [named[name] for name in mixture.nodes]
        inside, node = {*nodes}, named[mixture.end]
        while node.name != mixture.output:
            (node,) = node.users
            nodes.append(node)
            inside.add(node)
        self.nodes, self.inside, self.output = nodes, inside, named[mixture.output]

    def loss(self, kept: Iterable[int]) -> float:
        """The relative square error of the mixture's output if only these experts can be chosen."""
        gone = _without(self.mixture, kept)
        name, paired = self.output.name, self.whole.paired
        before: list[Tensor] = list(paired.merged.values[name])
        after = [self.value(gone, number) for number in range(len(before))]
        pairs = zip(paired.unpadded(name, before), paired.unpadded(name, after), strict=True)
        sums = torch.zeros(4, dtype=torch.float64)
        for y, z in pairs:
            y, z = y.double(), z.double()
            own = [(z - y).square().sum(), y.square().sum(), y.sum(), torch.tensor(float(y.numel()))]
            sums += torch.stack([value.cpu().double() for value in own])
        lost, power, total, count = paired.reduce(sums).tolist()
        error = lost / max(power - total**2 / max(count, 1.0), 1e-300)
        return error if error == error else inf

    def value(self, gone: Tensor | None, number: int) -> Tensor:
        """The mixture's output in one batch. gone: (experts,) bool, those that cannot be chosen, if not all can"""
        run, values = fx.Interpreter(self.captured.module), self.whole.paired.merged.values
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in run.env:
                    held = run.run_node(source) if source.op == "get_attr" else values[source.name][number]
                    run.env[source] = (
                        held.clone() if updates(self.captured.module, node) and isinstance(held, Tensor) else held
                    )
            roles = self.mixture.choices.get(node.name)
            if roles is None or gone is None:
                run.env[node] = run.run_node(node)
                continue
            first = node.all_input_nodes[0]
            scores = run.env[first]
            run.env[first] = scores.masked_fill(self._mask(gone, roles).to(scores.device), -inf)
            run.env[node] = run.run_node(node)
            run.env[first] = scores
        found: Tensor = run.env[self.output]
        return found

    def _mask(self, gone: Tensor, roles: Sequence[str]) -> Tensor:
        """`gone`, shaped to broadcast to a tensor whose axes have these roles."""
        each = self.mixture.experts // self.mixture.groups
        sizes = {"E": self.mixture.experts, "P": each, "G": self.mixture.groups if "P" in roles else 1}
        return gone.view([sizes.get(role, 1) for role in roles])
