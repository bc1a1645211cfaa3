"""Refit of stacked experts: the matrix of each expert is solved on the rows that are sent to it.

Rows are sorted by expert, and offsets say where those of each expert end. An expert with too few rows keeps what it
has. Both graphs send each row to the expert that the original chooses (see `calibration.decided`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.calibration.decided import expert_rows, real_rows, routed_operands, row_folds
from fxmerge.calibration.epilogue import affine
from fxmerge.calibration.held_out import NO_FOLD
from fxmerge.calibration.paired_run import PairedRun, Settings, Visit
from fxmerge.ir.provenance import Layer
from fxmerge.refit.records import EXACTLY, NO_BETTER, TOO_FEW, Refitted
from fxmerge.refit.solve import Problem, Rows, relative_error
from fxmerge.refit.targets import Target

UNKNOWN = "unchanged: which rows an expert computes is not known"


@dataclass(frozen=True)
class Experts:
    """Solves layers of experts in one paired run."""

    paired: PairedRun
    settings: Settings
    exact: float

    def solve(self, visit: Visit, layer: Layer, weight: Tensor, generator: torch.Generator) -> Refitted:
        """Solves each expert's matrix in place, where that is better on samples held out. weight: the merged graph's"""
        found = self._rows(visit, layer)
        if found is None:
            return Refitted(layer.module, 0.0, 0.0, UNKNOWN)
        inputs, ends, folds = found
        assert layer.writes is not None and self.paired.alive is not None
        every = layer.writes.view(len(weight), -1) if layer.writes_apart else layer.writes.expand(len(weight), -1)
        total = torch.zeros(3, dtype=torch.float64)  # energy, and the square errors before and after
        solved = judged = False
        for expert in range(len(weight)):
            index = [i[f[i] != PADDED] for i, f in zip(expert_rows(ends, expert), folds, strict=True)]
            index = _fewer(index, self.settings.rows, generator)
            stays = self.paired.alive[every[expert]].nonzero().flatten()
            unit = torch.ones(len(stays), dtype=torch.float64)
            rows = Rows(
                [x[i][:, None] for x, i in zip(inputs, index, strict=True)],
                [
                    Target(outputs=y[i][:, stays.to(y.device)], axis=1, affine=affine(unit, 0 * unit), bounds=None)
                    for y, i in zip(visit.outputs, index, strict=True)
                ],
                [f[i] for f, i in zip(folds, index, strict=True)],
            )
            matrix = weight.data[expert].T if layer.transposed else weight.data[expert]  # (out, in), a view
            before, after = self._improve(rows, matrix)
            if before is None:
                continue
            judged = True
            solved |= after < before
            energy = rows.energy(self.settings.reduce)
            total += torch.tensor([energy, before * energy, after * energy], dtype=torch.float64)
        if not judged:
            return Refitted(layer.module, 0.0, 0.0, TOO_FEW)
        errors = (total[1:] / total[0].clamp(min=1e-300)).tolist()
        note = "" if solved else EXACTLY if errors[0] <= self.exact else NO_BETTER
        return Refitted(layer.module, errors[0], errors[1], note)

    def _improve(self, rows: Rows, matrix: Tensor) -> tuple[float | None, float]:
        """The relative square errors before and after; None with too few rows. matrix: (o, p), written in place."""
        reduce = self.settings.reduce
        start = matrix.double()[None]
        bias = start.new_zeros(1, len(matrix))
        if not rows.judging.count(reduce) or not rows.solved.count(reduce):
            return None, 0.0
        whole = relative_error(rows, start, bias, reduce)
        if not whole > self.exact:  # NaN too
            return (whole, whole) if whole <= self.exact else (None, 0.0)
        found = Problem(rows=rows, start=start, bias=bias, wanted=None, centred=False, reduce=reduce, rounds=0).best()
        if not found.after < found.before:
            return found.before, found.before
        matrix.copy_(found.weight[0])
        return found.before, found.after

    def _rows(self, visit: Visit, layer: Layer) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor]] | None:
        """By batch: the merged graph's inputs, where each expert's rows end, and the fold of each row."""
        node, values = visit.node, self.paired.merged.values
        twin, taken = self.paired.original.named[node.name], routed_operands(node)
        folds = row_folds(self.paired, twin, list(map(len, visit.outputs)))
        real = real_rows(self.paired, twin)
        if taken is None or folds is None or real is None:
            return None
        folds = [f if r is None else torch.where(r, f, PADDED) for f, r in zip(folds, real, strict=True)]
        return values[taken[0].name], values[taken[1].name], folds


PADDED = NO_FOLD - 1  # the fold of rows that are padding


def _fewer(index: list[Tensor], most: int, generator: torch.Generator) -> list[Tensor]:
    """About `most` rows at random, the same share of each batch."""
    total = sum(map(len, index))
    if total <= most:
        return index
    return [
        i[torch.randperm(len(i), generator=generator)[: max(1, len(i) * most // total)].sort().values] for i in index
    ]
