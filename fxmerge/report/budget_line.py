"""The report's line about a budget: the share that was requested and the share that is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fxmerge.report.reports import Report

from fxmerge.ir.groups import survivors
from fxmerge.options import TOLERANCE
from fxmerge.plan import planned
from fxmerge.planning.budget import original_of
from fxmerge.planning.counted import attentions_within, flops_within, named, parameters_within


@dataclass(frozen=True, kw_only=True)
class Spent:
    """A budget and its outcome, as shares of the original model's cost.

    kind:   "flops", "params", "cache" or "latency"
    asked:  the share that was requested
    left:   the share that the merged model needs
    of:     patterns of the modules whose cost was counted; empty for all of them
    noise:  the standard error of a latency, measured by timing the original against itself; otherwise None
    """

    kind: str
    asked: float
    left: float
    noise: float | None = None
    of: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether the merged model meets the budget within the tolerance for its kind."""
        return abs(self.left / self.asked - 1) <= TOLERANCE[self.kind]

    def line(self) -> str:
        """The line for the report."""
        noise = "" if self.noise is None else f" (+- {self.noise:.1%}, measured by timing the original against itself)"
        within = f"{TOLERANCE[self.kind]:.0%}"
        outcome = f"within {within}" if self.met else f"NOT within {within}: {self.left / self.asked - 1:+.1%}"
        what = named(self.kind, self.of)
        return f"budget     {self.asked:.1%} of the {what} requested, {self.left:.1%} left{noise}, {outcome}"


def spent(report: Report) -> Spent | None:
    """The outcome of a budget, or None if there is no budget or if its latency was not measured."""
    options, timing = report.plan.options, report.timing
    for kind, asked in options.budget.items():
        if kind == "latency":
            return Spent(kind=kind, asked=asked, left=timing.share, noise=timing.noise) if timing else None
        was, left = {"flops": _flops, "params": _parameters, "cache": _cache}[kind](report, options.of)
        return Spent(kind=kind, asked=asked, left=left / max(was, 1), of=options.of)
    return None


def _parameters(report: Report, of: Sequence[str]) -> list[int]:
    """Of the original and of the merged model."""
    return [sum(parameters_within(m, of).values()) for m in (original_of(report.captured), report.module)]


def _flops(report: Report, of: Sequence[str]) -> list[int]:
    """Likewise. The FLOPs of a node that could not be counted are left out, where some modules are chosen."""
    if not of:
        return [report.before.flops, report.after.flops]
    by_node = [{name: node.flops or 0 for name, node in c.by_node.items()} for c in (report.before, report.after)]
    return [sum(flops_within(report.captured, flops, of).values()) for flops in by_node]


def _cache(report: Report, of: Sequence[str]) -> list[int]:
    """Likewise, in bytes per token."""
    found, grouping = attentions_within(report.captured, report.facts, of), report.grouping
    kept = survivors(grouping, [pair for part in grouping.parts for pair in planned(part.groups, report.plan)])
    return [sum(one.stored(alive) for one in found) for alive in (torch.ones_like(kept), kept)]
