"""Refit of stacked experts: the matrix of each expert is solved on the rows that are sent to it.

Rows are sorted by expert, and offsets say where those of each expert end. An expert with too few rows keeps what it
has. Both graphs send each row to the expert that the original chooses (see `calibration.decided`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmerge.calibration.decided import rows_of
from fxmerge.calibration.epilogue import affine
from fxmerge.calibration.held_out import FOLDS, HELD_OUT, NO_FOLD
from fxmerge.calibration.paired_run import PairedRun, Settings, Visit
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.refit.records import EXACTLY, NO_BETTER, TOO_FEW, Refitted
from fxmerge.refit.solve import Problem, Rows, relative_error
from fxmerge.refit.targets import Target

UNKNOWN = "unchanged: which rows an expert computes is not known"


def is_routed(layer: Layer, facts: Provenance) -> bool:
    """Is it a layer of experts whose rows are sorted by expert?"""
    return layer.is_stacked and facts.rules.get(layer.node) == "grouped_mm"


@dataclass(frozen=True)
class Experts:
    """Solves layers of experts in one paired run, whose values it keeps as long as it needs them."""

    paired: PairedRun
    settings: Settings
    exact: float

    def expect(self, layers: Sequence[Layer]) -> None:
        """Keeps the values that tell which position each row of these layers is."""
        stream = self.paired.original
        for layer in layers:
            index = rows_of(stream.named[layer.node], self.paired.facts)
            if index is not None:
                stream.keep([index.name], layer.node)

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
            index = [torch.arange(int(e[expert - 1]) if expert else 0, int(e[expert])) for e in ends]
            index = [i[f[i] != PADDED] for i, f in zip(index, folds, strict=True)]
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
        node, twin = visit.node, self.paired.original.named[visit.node.name]
        source, offsets = _operand(node, 0, "input"), _operand(node, 2, "offs")
        position = rows_of(twin, self.paired.facts)
        values = self.paired.original.values
        if source is None or offsets is None or position is None or position.name not in values:
            return None
        folds = []
        for number, (y, at) in enumerate(zip(visit.outputs, values[position.name], strict=True)):
            own, count = self.paired.folds[number], int(at.max()) + 1 if at.numel() else 0
            if len(at) != len(y) or not count or count % len(own):
                return None
            held = any(bool((f == HELD_OUT).any()) for f in self.paired.folds)
            of_position = own.repeat_interleave(count // len(own)) if held else torch.arange(count) * FOLDS // count
            real = None
            if self.paired.padding is not None:
                shape = (count, y.size(-1))
                real = self.paired.padding.real(layer.node, self.paired.original.batches[number], shape)
            if real is not None:
                of_position = torch.where(real.flatten().cpu(), of_position, PADDED)
            folds.append(of_position[at.cpu()])
        return self.paired.merged.values[source.name], values[offsets.name], folds


PADDED = NO_FOLD - 1  # the fold of rows that are padding


def _fewer(index: list[Tensor], most: int, generator: torch.Generator) -> list[Tensor]:
    """About `most` rows at random, the same share of each batch."""
    total = sum(map(len, index))
    if total <= most:
        return index
    return [
        i[torch.randperm(len(i), generator=generator)[: max(1, len(i) * most // total)].sort().values] for i in index
    ]


def _operand(node: fx.Node, at: int, name: str) -> fx.Node | None:
    given = node.args[at] if at < len(node.args) else node.kwargs.get(name)
    return given if isinstance(given, fx.Node) else None
