"""Spending: what is left of a model, beside what its budget asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxmerge.graph.cost import Cost
from fxmerge.graph.latency import Timing
from fxmerge.options import NAMES, TOLERANCE


@dataclass(frozen=True)
class Spent:
    """Shares of the original; of a latency also the standard error, from the original against itself."""

    kind: str
    asked: float
    left: float
    noise: float | None = None

    @property
    def met(self) -> bool:
        """Is what is left what was asked for, within the kind's tolerance?"""
        return abs(self.left / self.asked - 1) <= TOLERANCE[self.kind]

    def line(self) -> str:
        noise = "" if self.noise is None else f" (+- {self.noise:.1%}, as the original differs from itself)"
        within = f"{TOLERANCE[self.kind]:.0%}"
        told = f"within {within}" if self.met else f"NOT within {within}: {self.left / self.asked - 1:+.1%}"
        return f"budget     {self.asked:.1%} of the {NAMES[self.kind]} asked for, {self.left:.1%} left{noise}, {told}"


def spent(budget: Mapping[str, float], before: Cost, after: Cost, timing: Timing | None) -> Spent | None:
    """None without a budget, and for a latency that nobody has measured."""
    for kind, asked in budget.items():
        if kind == "flops":
            return Spent(kind, asked, after.flops / max(before.flops, 1))
        if kind == "params":
            return Spent(kind, asked, after.parameters / max(before.parameters, 1))
        return Spent(kind, asked, timing.share, timing.noise) if timing else None
    return None
