"""Which model is handed out: the refitted one, the merely merged one, or the merely pruned one.

Their outputs are compared with the original's on samples that were held out of refit's solves, and the closest model
is handed out, so that neither refit nor what kept channels carry ends below plain pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from math import isfinite, sqrt
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxmerge.calibration.held_out import HELD_OUT, JUDGES, of_samples, sample_folds, samples
from fxmerge.calibration.output_error import output_error
from fxmerge.calibration.paired_run import Pair, Settings
from fxmerge.calibration.trial_runs import refused
from fxmerge.ir.capture import Capture
from fxmerge.progress import Stage
from fxmerge.refit.records import Refitted
from fxmerge.refit.refit_layers import refit

REFITTED, MERGED, PRUNED = "refitted", "merged without refit", "pruned"


class Draft(Protocol):
    """What has a merged graph."""

    @property
    def graph(self) -> fx.GraphModule: ...


@dataclass(frozen=True)
class HandedOut:
    """The model that was handed out, and the relative error of each candidate's outputs on the samples held out."""

    name: str
    errors: Mapping[str, float]

    def line(self) -> str:
        """The errors in one line, for the report; "" if they were not measured."""
        known = [f"{name} {error:.2g}" for name, error in self.errors.items() if isfinite(error)]
        return f"relative error on samples held out: {', '.join(known)}; handed out: {self.name}" if known else ""


def closest(
    captured: Capture,
    pair: Pair,
    others: Mapping[str, Callable[[], Draft]],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
    stage: Stage,
) -> tuple[tuple[Refitted, ...], HandedOut]:
    """Refits a pair's merged graph in place. Returns refit's records, and which model is to be handed out.

    others: what makes the draft as it was before refit, and the merely pruned one. There are no records if one of them
            is closer to the original
    """
    assert pair.merged is not None
    judging, judges = _judging(captured, batches, settings)
    alone = replaced(settings, made=0)

    def off(graph: fx.GraphModule | None) -> float:
        return sqrt(output_error(replaced(pair, merged=graph), judging, alone, judges))

    errors = {MERGED: off(pair.merged)}
    stage("refit")
    refitted = refit(pair, batches, settings, stage)
    errors = {REFITTED: off(pair.merged), **errors, PRUNED: off(others[PRUNED]().graph)}
    best = min(errors, key=errors.__getitem__)
    return refitted if best == REFITTED else (), HandedOut(best, errors)


def _judging(
    captured: Capture, batches: Sequence[Sequence[Any]], settings: Settings
) -> tuple[list[Sequence[Any]], list[Tensor]]:
    """The batches with samples held out, and which they are; all samples of the first batch if none is held out.

    The other samples are left out if the model takes batches of these alone, unless streams are held and few samples
    would be left to hold them by.
    """
    held = [folds == HELD_OUT for folds in sample_folds([samples(batch) for batch in batches], settings.made)]
    chosen = [(batch, some) for batch, some in zip(batches, held, strict=True) if some.any()]
    if not chosen:
        return [batches[0]], [torch.ones(samples(batches[0]), dtype=torch.bool)]
    enough = not settings.held or sum(int(some.sum()) for _, some in chosen) >= JUDGES
    alone = [of_samples(batch, some) for batch, some in chosen]
    if enough and not any(refused(captured, batch) for batch in {samples(batch): batch for batch in alone}.values()):
        return list(alone), [some[some] for _, some in chosen]
    return [batch for batch, _ in chosen], [some for _, some in chosen]
