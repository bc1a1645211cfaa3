"""Allocators: how a budget is shared out between groups. ALLOCATORS maps a name to a function of a `Problem`.

    uniform   every group keeps the same share, as nearly as whole channels allow
    greedy    from the group that loses least for what it saves, again and again, along the lower convex hull of each
              group's error as a function of the channels kept (Pareto points; Shoham & Gersho, 1988, for rates)

An allocator gives the rung that each group stands on. What a model costs is a sum of products of widths, so that what a
channel saves depends on what other groups have lost: prices are asked for anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Counts = Mapping[str, tuple[int, ...]]  # group -> channels kept in each of its cells


@dataclass(frozen=True)
class Price:
    """One kind of cost as a function of k, the channels kept in each cell of each group:

    width(k) = fixed + sum_c m_c k_c                    m_c: places that one channel of cell c holds
    price(k) = sum_t coefficient_t prod_f width_tf(k)   t: a parameter, or an op; f: its axes
    """

    slots: Mapping[str, slice]  # group -> its cells in k
    full: Floats  # (C,) k of the original
    coefficients: Floats  # (T,)
    factors: NDArray[np.int64]  # (T, F) rows of `widths`; the last row is 1
    widths: csr_array  # (W, C)
    fixed: Floats  # (W,)
    original: float  # the original's price, without what a merge would add to it

    def __call__(self, counts: Counts) -> float:
        return self.at(self.vector(counts))

    def vector(self, counts: Counts) -> Floats:
        """k (C,); groups that are not named keep all."""
        k = self.full.copy()
        for name, kept in counts.items():
            k[self.slots[name]] = kept
        return k

    def at(self, k: Floats) -> float:
        return float(self._values(k).prod(1) @ self.coefficients)

    def gradient(self, k: Floats) -> tuple[float, Floats]:
        """The price, and what one channel more of each cell adds to it: (C,)."""
        values = self._values(k)
        slope = np.zeros(len(self.fixed))
        for f in range(values.shape[1]):
            others = np.delete(values, f, 1).prod(1) * self.coefficients
            slope += np.bincount(self.factors[:, f], others, len(slope))
        return float(values.prod(1) @ self.coefficients), self.widths.T @ slope

    def _values(self, k: Floats) -> Floats:
        found: Floats = (self.widths @ k + self.fixed)[self.factors]
        return found


@dataclass(frozen=True)
class Ladder:
    """What one group may keep, the most first: rung r keeps counts[r] of its cells, at an error of errors[r]."""

    counts: Floats  # (R, cells)
    errors: Floats  # (R,) ascending

    @property
    def totals(self) -> Floats:
        found: Floats = self.counts.sum(1)
        return found


@dataclass(frozen=True)
class Problem:
    """Ladders of all groups in the order of `price.slots`, and what the model may cost."""

    ladders: tuple[Ladder, ...]
    price: Price
    target: float

    def kept(self, rungs: Sequence[int] | Ints) -> Floats:
        """k (C,) of these rungs."""
        return np.concatenate([np.zeros(0), *(x.counts[r] for x, r in zip(self.ladders, rungs, strict=True))])

    def cost(self, rungs: Sequence[int] | Ints) -> float:
        return self.price.at(self.kept(rungs))

    @property
    def bottom(self) -> Ints:
        return np.array([len(x.counts) - 1 for x in self.ladders], dtype=np.int64)


def uniform(problem: Problem) -> Ints:
    """The largest share that the budget allows; then single rungs up, the most rounded down first."""

    def at(share: float) -> Ints:
        return np.array([_nearest(x.totals, share) for x in problem.ladders], dtype=np.int64)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.cost(at(middle)) <= problem.target else (low, middle)
    rungs = at(low)
    short = [low - x.totals[r] / x.totals[0] for x, r in zip(problem.ladders, rungs, strict=True)]
    return _filled(problem, rungs, sorted(range(len(rungs)), key=lambda g: -short[g]))


def greedy(problem: Problem) -> Ints:
    """Down by the least error per cost saved, until the budget is met; then up again wherever it leaves room."""
    lines = [hull(x.totals, x.errors) for x in problem.ladders]
    rungs, bottom = np.zeros(len(lines), dtype=np.int64), problem.bottom
    slots = list(problem.price.slots.values())
    k, fewer = problem.kept(rungs), np.zeros_like(problem.price.full)  # the channels kept, and those of the next step
    paid, rate = (
        np.full(len(lines), np.inf),
        np.zeros(len(lines)),
    )  # what the next step loses, and that by what it saves

    def ahead(g: int) -> None:
        x, r = problem.ladders[g], rungs[g]
        k[slots[g]] = x.counts[r]
        if r < bottom[g]:
            fewer[slots[g]] = x.counts[r] - x.counts[r + 1]
            paid[g] = lines[g][r + 1] - lines[g][r]
        else:
            paid[g] = np.inf

    for g in range(len(lines)):
        ahead(g)
    starts = [slot.start for slot in slots]
    while np.isfinite(paid).any():
        cost, slope = problem.price.gradient(k)
        if cost <= problem.target:
            break
        rate = paid / np.maximum(np.add.reduceat(slope * fewer, starts), 1e-300)
        g = int(rate.argmin())
        rungs[g] += 1
        ahead(g)
    return _filled(problem, rungs, np.argsort(-rate, kind="stable").tolist())


def hull(totals: Floats, errors: Floats) -> Floats:
    """The lower convex hull of (channels kept, error) at every rung; totals descend."""
    corners = [0]
    for r in range(1, len(totals)):
        while len(corners) > 1 and _slope(totals, errors, corners[-2], corners[-1]) >= _slope(
            totals, errors, corners[-1], r
        ):
            corners.pop()
        corners.append(r)
    found: Floats = np.interp(-totals, -totals[corners], errors[corners])
    return found


def _slope(totals: Floats, errors: Floats, a: int, b: int) -> float:
    return float((errors[b] - errors[a]) / (totals[a] - totals[b]))


def _nearest(totals: Floats, share: float) -> int:
    """The rung nearest to a share; of two the narrower."""
    off = np.abs(totals - share * totals[0])
    return int(len(off) - 1 - off[::-1].argmin())


def _filled(problem: Problem, rungs: Ints, order: Iterable[int]) -> Ints:
    """Single rungs up, in this order, where the budget is still met."""
    for g in order:
        if rungs[g] > 0:
            rungs[g] -= 1
            if problem.cost(rungs) > problem.target:
                rungs[g] += 1
    return rungs


ALLOCATORS: dict[str, Callable[[Problem], Ints]] = {"uniform": uniform, "greedy": greedy}
