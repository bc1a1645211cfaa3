"""The weights of one layer, solved by least squares from a sample of its output positions, and judged on others.

    W' = argmin |P W' - T|^2 + ridge |W' - W0|^2,   W0 the current weights      (see `least_squares`)

A solve is judged on samples that are held out of it (see `held_out`): they choose the ridge from LADDER, and whether W'
replaces W0 at all. Where these have few positions, solves without each of the folds in turn are judged instead. Before
a rectifier, the targets T and the weights are computed in turn (see `targets`). Before a BatchNorm, the mean and the
standard deviation of the outputs are then matched to the original's, channel by channel.

All outputs have the Gram matrix and the ridge in common, and nothing else. A layer with many weights, such as the head
of a language model, is solved for a part of its outputs after the other: of the matrices that are as large as its
weight, memory then holds a single one in float64, R - G W0 of `least_squares`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeVar

import torch
from torch import Tensor

from fxmerge.calibration.held_out import FOLDS, HELD_OUT, NO_FOLD
from fxmerge.methods.least_squares import Reduce, System, system, without_each
from fxmerge.methods.linalg import Lifted
from fxmerge.refit.targets import Target

MATCH = 2.0  # the factor that matches the standard deviations stays between 1 / MATCH and MATCH
RIDGE = 3e-2  # the pull towards the current weights, as a share of the Gram's mean diagonal: the first that is tried
LADDER = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, inf)  # times RIDGE; inf: the current weights with another bias
FEW = 128  # positions held out; with fewer, each fold judges in turn
WORTH = 0.99  # another ridge is taken if it lowers the error to this share, which is more than chance
ROUNDS = 6  # of the alternation before a rectifier
AT_ONCE = 2**24  # weights that are solved at a time, about: 128 MiB in float64

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """A sample of a layer's output positions, by batch."""

    patches: list[Tensor]  # (rows, g, p), of the merged graph
    targets: list[Target]  # (rows, o)
    folds: list[Tensor]  # (rows,), see `calibration.held_out`

    @property
    def solved(self) -> Rows:
        """The positions that are solved on."""
        return self.only([folds != HELD_OUT for folds in self.folds])

    @property
    def judging(self) -> Rows:
        """The positions that are held out."""
        return self.only([folds == HELD_OUT for folds in self.folds])

    def only(self, inside: list[Tensor]) -> Rows:
        """Some of the positions: (rows,) bool by batch."""
        index_of = [i.nonzero().flatten() for i in inside]
        return Rows(
            [p.index_select(0, i) for p, i in zip(self.patches, index_of, strict=True)],
            [t.rows(i) for t, i in zip(self.targets, index_of, strict=True)],
            [f[i] for f, i in zip(self.folds, index_of, strict=True)],
        )

    def of_outputs(self, some: slice) -> Rows:
        """The same positions with the targets of some outputs."""
        return replace(self, targets=[t.of_outputs(some) for t in self.targets])

    def count(self, reduce: Reduce) -> int:
        """The number of positions."""
        total = torch.tensor(float(sum(map(len, self.patches))), dtype=torch.float64, device=self.patches[0].device)
        return int(reduce(total))

    def energy(self, reduce: Reduce) -> float:
        """The sum of the squares of the targets."""
        return float(reduce(torch.stack([t.corrected.double().square().sum() for t in self.targets]).sum()))


@dataclass(frozen=True)
class Solution:
    """New weights (g, o, p) and biases (g, o), the ridge, and the relative square error on positions that were not
    solved on, with the weights before and after.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    before: float
    after: float


@dataclass(frozen=True)
class _Plain:
    """The solution for targets as they are: weights (g, o, p), biases (g, o), and G + ridge of each block, factored;
    None for an infinite ridge.
    """

    weight: Tensor
    bias: Tensor
    factors: Lifted | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a layer is solved for.

    start, bias: W0 (g, o, p) in any dtype, and the current biases (g, o) in float64
    wanted:   the mean and the variance of the outputs to match, (o,) and (o,); None before anything but a BatchNorm
    centred:  whether the layer may have a bias
    rounds:   of the alternation, where a rectifier follows
    """

    rows: Rows
    start: Tensor
    bias: Tensor
    wanted: tuple[Tensor, Tensor] | None
    centred: bool
    reduce: Reduce
    rounds: int = ROUNDS

    def best(self) -> Solution:
        """The solution with the ridge that is best on positions that were not solved on."""
        parts = self._parts()
        if len(parts) > 1 and self.rows.of_outputs(slice(0)).judging.count(self.reduce) >= FEW:
            return self._by_parts(parts)
        solved, judging = self.rows.solved, self.rows.judging
        few = judging.count(self.reduce) < FEW
        own = replace(self, start=self.start.double())
        normal = own._system(solved)
        splits = [(normal, judging)]
        if few:
            judging = self.rows.only([folds != NO_FOLD for folds in self.rows.folds])
            splits = own._splits(judging)
        gaps = [one.gap(own.start) for one, _ in splits]

        def at(ridge: float) -> tuple[float, _Plain]:
            found, total = None, 0.0
            for (one, rows), gap in zip(splits, gaps, strict=True):
                found = own._plain(one, gap, _factors(one, ridge))
                total += error(rows, found.weight, found.bias, self.reduce)
            assert found is not None
            return total, found

        ridge, (total, plain) = _searched(at)
        if len(splits) > 1:
            plain = own._plain(normal, normal.gap(own.start), _factors(normal, ridge))
        weight, bias = own._solution(solved, normal, plain)
        energy = max(judging.energy(self.reduce), 1e-300)
        whole = total if len(splits) > 1 else error(judging, weight, bias, self.reduce)
        before = error(judging, own.start, self.bias, self.reduce)
        return Solution(weight, bias, ridge, before / energy, whole / energy)

    def _parts(self) -> list[slice]:
        """Outputs that are solved at a time: all of them, unless the weight is large and has a single block."""
        blocks, outputs, width = self.start.shape
        step = max(1, AT_ONCE // max(width, 1)) if blocks == 1 else outputs
        return [slice(first, first + step) for first in range(0, outputs, max(step, 1))]

    def _part(self, some: slice) -> Problem:
        """The problem of some outputs. Its rows are those of all."""
        wanted = None if self.wanted is None else (self.wanted[0][some], self.wanted[1][some])
        return replace(self, start=self.start[:, some].double(), bias=self.bias[:, some], wanted=wanted)

    def _by_parts(self, parts: Sequence[slice]) -> Solution:
        """The same as `best`, for some of the outputs after others. The targets of a part are copied, never all."""
        bare = self.rows.of_outputs(slice(0))
        places = {False: bare.solved, True: bare.judging}

        def rows_of(some: slice, held: bool) -> Rows:
            own, index_of = self.rows.of_outputs(some), [((f == HELD_OUT) == held).nonzero()[:, 0] for f in bare.folds]
            return replace(places[held], targets=[t.rows(i) for t, i in zip(own.targets, index_of, strict=True)])

        normal: System | None = None
        gaps, means = [], []
        for some in parts:
            own, rows = self._part(some), rows_of(some, held=False)
            targets = own._shaped([t.corrected for t in rows.targets])
            one = own._system(rows) if normal is None else normal.with_targets(rows.patches, targets, self.reduce)
            normal = normal or one
            gaps.append(one.gap(own.start))
            means.append(one.mean_t)
        assert normal is not None
        systems = [replace(normal, mean_t=mean, cross=gap) for mean, gap in zip(means, gaps, strict=True)]
        energy, before = 0.0, 0.0
        for some in parts:
            rows = rows_of(some, held=True)
            energy += rows.energy(self.reduce)
            before += error(rows, self.start[:, some], self.bias[:, some], self.reduce)
        energy = max(energy, 1e-300)

        def at(ridge: float, rounds: int = 0, matched: bool = False) -> tuple[float, tuple[Tensor, Tensor]]:
            """The error of the solution with a ridge; its weights, rounded to the dtype of W0, and its biases."""
            factors, total = _factors(normal, ridge), 0.0
            weights, biases = torch.empty_like(self.start), torch.empty_like(self.bias)
            for some, one in zip(parts, systems, strict=True):
                own = self._part(some)
                own = replace(own, rounds=rounds, wanted=own.wanted if matched else None)
                found = own._solution(rows_of(some, held=False), one, own._plain(one, one.cross, factors))
                weights[:, some], biases[:, some] = found
                total += error(rows_of(some, held=True), *found, self.reduce)
            return total, (weights, biases)

        ridge, (whole, found) = _searched(at)
        if self.wanted is not None or any(target.bounds is not None for target in self.rows.targets):
            whole, found = at(ridge, self.rounds, matched=True)
        return Solution(*found, ridge, before / energy, whole / energy)

    def _splits(self, rows: Rows) -> list[tuple[System, Rows]]:
        """For each fold, the system of all others and the rows of that one."""
        targets = self._shaped([t.corrected for t in rows.targets])
        systems = without_each(rows.patches, targets, rows.folds, FOLDS, self.reduce, self.centred)
        return [(one, rows.only([folds == fold for folds in rows.folds])) for fold, one in enumerate(systems)]

    def _system(self, rows: Rows) -> System:
        return system(rows.patches, self._shaped([t.corrected for t in rows.targets]), self.reduce, self.centred)

    def _shaped(self, targets: list[Tensor]) -> list[Tensor]:
        return [t.reshape(len(t), *self.start.shape[:2]) for t in targets]

    def _plain(self, normal: System, gap: Tensor, factors: Lifted | None) -> _Plain:
        weight = self.start if factors is None else normal.solve(self.start, factors, gap)
        return _Plain(weight, normal.intercept(weight, normal.mean_t), factors)

    def _solution(self, rows: Rows, normal: System, plain: _Plain) -> tuple[Tensor, Tensor]:
        """(W', b'), (g, o, p) and (g, o), from the positions that are solved on and their system."""
        rounds = self.rounds if any(target.bounds is not None for target in rows.targets) else 0
        weight, bias = plain.weight, plain.bias
        last, pace = (weight, bias), 1.0
        for _ in range(rounds):
            # each round is a gradient step of a convex loss, in the Gram's metric: with FISTA's momentum fewer are
            # needed (Beck & Teboulle, 2009, equations 4.1 to 4.3)
            here, faster = (weight, bias), (1 + (1 + 4 * pace**2) ** 0.5) / 2
            ahead, pace = (pace - 1) / faster, faster
            weight, bias = (now + ahead * (now - then) for now, then in zip(here, last, strict=True))
            last = here
            predicted = [_predict(p, weight, bias) for p in rows.patches]
            moved = [target.given(y) for target, y in zip(rows.targets, predicted, strict=True)]
            normal = normal.with_targets(rows.patches, self._shaped(moved), self.reduce)
            weight = weight if plain.factors is None else normal.solve(weight, plain.factors)
            bias = normal.intercept(weight, normal.mean_t)
        if self.wanted is not None and self.centred:
            mean, variance = (t.view(self.start.shape[:2]) for t in self.wanted)
            own = normal.variance(weight)
            factor = (variance / own.clamp(min=1e-300)).sqrt().clamp(1 / MATCH, MATCH)
            weight = weight * torch.where(own > 0, factor, 1)[:, :, None]
            bias = normal.intercept(weight, mean)
        return weight, bias


def _factors(normal: System, ridge: float) -> Lifted | None:
    return None if ridge == inf else normal.lifted(ridge)


def _searched(at: Callable[[float], tuple[float, T]]) -> tuple[float, tuple[float, T]]:
    """The ridge with the least error, and what `at` returns for it: the error, and anything else."""
    here = LADDER.index(1.0)
    now, ahead, step = at(LADDER[here] * RIDGE), at(LADDER[here + 1] * RIDGE), 1
    if not ahead[0] < now[0]:  # the error has one minimum along the ladder, or nearly so
        ahead, step = at(LADDER[here - 1] * RIDGE), -1
    while ahead[0] < WORTH * now[0]:
        here, now = here + step, ahead
        if not 0 <= here + step < len(LADDER):
            break
        ahead = at(LADDER[here + step] * RIDGE)
    return LADDER[here] * RIDGE, now


def error(rows: Rows, weight: Tensor, bias: Tensor, reduce: Reduce) -> float:
    """The square error of a layer's outputs over all rows and channels; before a rectifier, of what passes it."""
    found = []
    for patch, target in zip(rows.patches, rows.targets, strict=True):
        predicted = _predict(patch, weight, bias)
        found.append((predicted - target.given(predicted)).double().square().sum())
    return float(reduce(torch.stack(found).sum()))


def relative_error(rows: Rows, weight: Tensor, bias: Tensor, reduce: Reduce) -> float:
    """The square error as a share of the targets' squares."""
    return error(rows, weight, bias, reduce) / max(rows.energy(reduce), 1e-300)


def _predict(patch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Outputs (rows, o) for patches (rows, g, p), in the patches' precision, but at least float32."""
    patch = patch if patch.dtype == torch.float64 else patch.float()
    out = torch.baddbmm(bias.to(patch)[:, None], patch.transpose(0, 1), weight.to(patch).mT)  # (g, rows, o)
    return out.transpose(0, 1).flatten(1)
