"""Which model is handed out: the refitted one, the merely merged one, or the merely pruned one.

Their outputs are compared with the original's on samples that were held out of refit's solves, and the closest model
is handed out, so that neither refit nor what kept channels carry ends below plain pruning.

On probes, refit holds BatchNorms by the probes' statistics, which the user's run will not. Where these are far from the
running ones, a model that is close as refit runs it can be far off, and is not handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from math import isfinite, sqrt
from typing import Any, Protocol

from torch import fx

from fxmerge.calibration.division import judging
from fxmerge.calibration.output_error import output_error
from fxmerge.calibration.paired_run import Pair, Settings
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import batch_norms
from fxmerge.progress import Stage
from fxmerge.refit.records import Refitted
from fxmerge.refit.refit_layers import refit

REFITTED, MERGED, PRUNED = "refitted", "merged without refit", "pruned"
FAR = 2.0  # times the least error: what is farther as it runs is not handed out, however close it is as refit runs it


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
    ways = [settings]
    if settings.held and batch_norms(pair.facts):
        ways.append(replaced(settings, held=False))
    compared = [(*judging(captured, batches, own), replaced(own, made=0)) for own in ways]

    def off(graph: fx.GraphModule | None) -> list[float]:
        """The error as refit runs the graph; where that differs, as the user will, too."""
        own = replaced(pair, merged=graph)
        return [sqrt(output_error(own, some, way, judges)) for some, judges, way in compared]

    errors = {MERGED: off(pair.merged)}
    stage("refit")
    refitted = refit(pair, batches, settings, stage)
    errors = {REFITTED: off(pair.merged), **errors, PRUNED: off(others[PRUNED]().graph)}
    held, run = ({name: own[way] for name, own in errors.items()} for way in (0, -1))
    decisive = run if run[min(held, key=held.__getitem__)] > FAR * min(run.values()) else held
    best = min(decisive, key=decisive.__getitem__)
    return refitted if best == REFITTED else (), HandedOut(best, decisive)
