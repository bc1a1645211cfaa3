"""The report's line about a budget: the share that was requested and the share that is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxmerge.graph.cost import Cost
from fxmerge.graph.latency import Timing
from fxmerge.options import NAMES, TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Spent:
    """A budget and its outcome, as shares of the original model's cost.

    kind:   "flops", "params" or "latency"
    asked:  the share that was requested
    left:   the share that the merged model needs
    noise:  the standard error of a latency, measured by timing the original against itself; otherwise None
    """

    kind: str
    asked: float
    left: float
    noise: float | None = None

    @property
    def met(self) -> bool:
        """Whether the merged model meets the budget within the tolerance for its kind."""
        return abs(self.left / self.asked - 1) <= TOLERANCE[self.kind]

    def line(self) -> str:
        """The line for the report."""
        noise = "" if self.noise is None else f" (+- {self.noise:.1%}, measured by timing the original against itself)"
        within = f"{TOLERANCE[self.kind]:.0%}"
        outcome = f"within {within}" if self.met else f"NOT within {within}: {self.left / self.asked - 1:+.1%}"
        return (
            f"budget     {self.asked:.1%} of the {NAMES[self.kind]} requested, {self.left:.1%} left{noise}, {outcome}"
        )


def spent(budget: Mapping[str, float], before: Cost, after: Cost, timing: Timing | None) -> Spent | None:
    """The outcome of a budget, or None if there is no budget or if its latency was not measured."""
    for kind, asked in budget.items():
        if kind == "flops":
            return Spent(kind=kind, asked=asked, left=after.flops / max(before.flops, 1))
        if kind == "params":
            return Spent(kind=kind, asked=asked, left=after.parameters / max(before.parameters, 1))
        return Spent(kind=kind, asked=asked, left=timing.share, noise=timing.noise) if timing else None
    return None
