"""Allocators, which divide a budget among groups. ALLOCATORS maps a name to a function of a `Problem`.

    uniform   every group keeps the same share of its channels, as nearly as whole channels allow
    greedy    one channel after another is taken from the group with the least error for the cost it saves, along the
              lower convex hull of each group's error as a function of the channels kept (the method of Shoham & Gersho,
              1988, for bit allocation)

An allocator returns the rung of each group on its ladder. The cost of a model is a sum of products of widths, so that
the cost that a channel saves depends on the channels that other groups keep: it is computed anew at every step.
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


@dataclass(frozen=True, kw_only=True)
class Price:
    """One kind of cost (parameters, FLOPs) as a function of k, the channels kept in each cell of each group:

    width(k) = fixed + sum_c m_c k_c                    m_c: places on an axis that one channel of cell c takes
    price(k) = sum_t coefficient_t prod_f width_tf(k)   t: a parameter, or an op; f: its axes
    """

    slots: Mapping[str, slice]  # group -> its cells in k
    full: Floats  # (C,) k of the original
    coefficients: Floats  # (T,)
    factors: NDArray[np.int64]  # (T, F) rows of `widths`; the last row is 1
    widths: csr_array  # (W, C)
    fixed: Floats  # (W,)
    original: float  # the price of the original, without biases that a merge would add

    def __call__(self, counts: Counts) -> float:
        return self.at(self.vector(counts))

    def vector(self, counts: Counts) -> Floats:
        """k (C,); groups that are not in `counts` keep all their channels."""
        k = self.full.copy()
        for name, kept in counts.items():
            k[self.slots[name]] = kept
        return k

    def at(self, k: Floats) -> float:
        """The price at k (C,)."""
        return float(self._values(k).prod(1) @ self.coefficients)

    def gradient(self, k: Floats) -> tuple[float, Floats]:
        """The price, and its derivative by the channels of each cell, (C,)."""
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
    """The allowed channel counts of one group, in descending order: rung r keeps counts[r] at an error of errors[r]."""

    counts: Floats  # (R, cells)
    errors: Floats  # (R,) ascending

    @property
    def totals(self) -> Floats:
        """The channels kept at each rung, in all cells together: (R,)."""
        found: Floats = self.counts.sum(1)
        return found


@dataclass(frozen=True)
class Problem:
    """The ladders of all groups, in the order of `price.slots`, and the price that the model may have at most."""

    ladders: tuple[Ladder, ...]
    price: Price
    target: float

    def kept(self, rungs: Sequence[int] | Ints) -> Floats:
        """k (C,) at these rungs."""
        return np.concatenate([np.zeros(0), *(x.counts[r] for x, r in zip(self.ladders, rungs, strict=True))])

    def cost(self, rungs: Sequence[int] | Ints) -> float:
        """The price at these rungs."""
        return self.price.at(self.kept(rungs))

    @property
    def bottom(self) -> Ints:
        """The last rung of each ladder."""
        return np.array([len(x.counts) - 1 for x in self.ladders], dtype=np.int64)


def uniform(problem: Problem) -> Ints:
    """The largest common share that the budget allows; then single rungs up, first where most was lost to rounding."""

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
    """One rung down with the least error for the cost saved, until the budget is met; then up where it leaves room."""
    lines = [hull(x.totals, x.errors) for x in problem.ladders]
    rungs, bottom = np.zeros(len(lines), dtype=np.int64), problem.bottom
    slots = list(problem.price.slots.values())
    k, fewer = problem.kept(rungs), np.zeros_like(problem.price.full)  # channels kept, and dropped by the next step
    paid = np.full(len(lines), np.inf)  # the error that the next step adds
    rate = np.zeros(len(lines))  # this error by the cost that the step saves

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
    """The rung nearest to a share of the channels; of two equally near ones the narrower."""
    off = np.abs(totals - share * totals[0])
    return int(len(off) - 1 - off[::-1].argmin())


def _filled(problem: Problem, rungs: Ints, order: Iterable[int]) -> Ints:
    """The rungs after single steps up, in this order, wherever the budget is still met."""
    for g in order:
        if rungs[g] > 0:
            rungs[g] -= 1
            if problem.cost(rungs) > problem.target:
                rungs[g] += 1
    return rungs


ALLOCATORS: dict[str, Callable[[Problem], Ints]] = {"uniform": uniform, "greedy": greedy}
