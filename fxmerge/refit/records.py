"""What refit did to each layer, for reports."""

from __future__ import annotations

from dataclasses import dataclass

EXACTLY, NO_BETTER = "unchanged: exact", "unchanged: no solution is better on samples held out of it"
TOO_FEW = "unchanged: too few output positions"


@dataclass(frozen=True)
class Refitted:
    """What refit did to one layer: the relative square error of its outputs before and after, on samples that were held
    out of the solve, and why it was left unchanged, or "".
    """

    name: str
    before: float
    after: float
    note: str = ""

    @property
    def solved(self) -> bool:
        """Whether the errors were measured."""
        return not self.note or self.note in (EXACTLY, NO_BETTER, TOO_FEW)
