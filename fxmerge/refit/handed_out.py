"""Which model is handed out: the refitted one, the merely merged one, or the merely pruned one.

Their outputs are compared with the original's on samples that were held out of refit's solves, and the closest model
is handed out, so that neither refit nor the absorption into the kept channels ends below plain pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.held_out import held_samples, samples
from fxmerge.calibration.paired_run import Pair, PairedRun, Settings
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.outputs import returned
from fxmerge.plan import GroupPlan
from fxmerge.refit.refit_layers import Refitted, refit

REFITTED, MERGED, PRUNED = "refitted", "merged without refit", "pruned"


@dataclass(frozen=True)
class HandedOut:
    """The model that was handed out, and the relative error of each candidate's outputs on the samples held out."""

    name: str
    errors: Mapping[str, float]

    def line(self) -> str:
        """The errors in one line, for the report; "" if they were not measured."""
        known = [f"{error:.3g} {name}" for name, error in self.errors.items() if isfinite(error)]
        return f"relative error on samples held out: {', '.join(known)}; handed out: {self.name}" if known else ""


Rewritten = tuple[fx.GraphModule, tuple[GroupPlan, ...]]  # a merged graph and its plan


def closest(
    candidates: Mapping[str, Callable[[], Rewritten]],
    streams: Callable[[fx.GraphModule], Pair],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
    stage: Callable[[str], None],
) -> tuple[fx.GraphModule, tuple[GroupPlan, ...], tuple[Refitted, ...], HandedOut]:
    """The refitted graph, its plan and refit's records, or the candidate without refit that is closer to the original.

    candidates: what makes each graph without refit, by name; the first one is refitted
    streams:    pairs a merged graph with the original
    """
    first, *others = candidates
    graph, plans = candidates[first]()
    errors = {first: output_error(streams(graph), batches, settings)}
    stage("refit")
    refitted = refit(streams(graph), batches, settings, stage)
    errors[REFITTED] = output_error(streams(graph), batches, settings)
    for name in others:
        errors[name] = output_error(streams(candidates[name]()[0]), batches, settings)
    best = min((REFITTED, first, *others), key=errors.__getitem__)
    if best != REFITTED:
        (graph, plans), refitted = candidates[best](), ()
    return graph, plans, refitted, HandedOut(best, errors)


def judging(batches: Sequence[Sequence[Any]], made: int) -> tuple[list[Sequence[Any]], list[Tensor]]:
    """The batches that have samples held out, and which they are; all samples of the first batches if none is."""
    held = held_samples([samples(batch) for batch in batches], made)
    chosen = [(batch, some) for batch, some in zip(batches, held, strict=True) if some.any()]
    if not chosen:
        chosen = [(batch, torch.ones(samples(batch), dtype=torch.bool)) for batch in batches[: made or 1][:1]]
    return [batch for batch, _ in chosen], [some for _, some in chosen]


def output_error(pair: Pair, batches: Sequence[Sequence[Any]], settings: Settings) -> float:
    """The relative error of the merged graph's outputs on the samples of these batches that are held out.

    It is the mean over the output tensors. Infinite where an output is not finite.
    """
    kept, held = judging(batches, settings.made)
    wrong: dict[int, list[Tensor]] = {}
    with evaluating(pair.original, *([pair.merged] if pair.merged is not None else [])), torch.no_grad():
        run = PairedRun(pair, kept, replaced(settings, made=0))
        for visit in run:
            if visit.node.op != "output":
                continue
            for number, some in enumerate(held):
                originals = returned(visit.outputs[number])
                for place, (y, z) in enumerate(
                    zip(originals, returned(run.merged.call(visit.node, number)), strict=True)
                ):
                    if y.dim() and y.size(0) == len(some):
                        y, z = y[some.to(y.device)], z[some.to(z.device)]
                    gap = torch.stack([(z - y).abs().double().square().sum(), y.abs().double().square().sum()])
                    wrong.setdefault(place, []).append(gap)
    sums = [settings.reduce(torch.stack(parts).sum(0)) for parts in wrong.values()]
    errors = [float((gap / every).sqrt()) for gap, every in sums if float(every) > 0]
    whole = sum(errors) / len(errors) if errors else inf
    return whole if isfinite(whole) else inf
