"""How far the outputs of a merged graph are from those of the original, on some of refit's batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.batches import Batches
from fxmerge.calibration.held_out import of_samples, samples
from fxmerge.calibration.padding import rest
from fxmerge.calibration.paired_run import Pair, PairedRun, Settings, Visit
from fxmerge.calibration.trial_runs import first_samples, takes_any_batch
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.outputs import returned
from fxmerge.ir.capture import Capture
from fxmerge.methods.least_squares import Reduce

FEWEST = 4  # batches that are divided without cutting one
TRIED = 64  # samples that drafts are fitted to and compared on, at most; at least a batch


def output_error(
    pair: Pair, batches: Sequence[Sequence[Any]], settings: Settings, judges: Sequence[Tensor] | None = None
) -> float:
    """The relative square error of the merged graph's outputs, as shares of their variances: the mean over all outputs.

    judges: (samples,) bool by batch: the samples that count; all by default

    0 where the model returns no real numbers, and infinite where they are not finite.
    """
    sums: list[Tensor] = []
    assert pair.merged is not None
    with evaluating(pair.original, pair.merged), torch.no_grad():
        run = PairedRun(pair, batches, settings)
        for visit in run:
            if visit.node.op == "output":
                sums = _sums(run, visit, judges)
    return relative(sums, settings.reduce)


def relative(sums: Sequence[Tensor], reduce: Reduce) -> float:
    """The relative square error, the mean over outputs, from `difference` summed over batches, for each output."""
    if not sums:
        return 0.0
    total = reduce(torch.stack(list(sums)))  # (outputs, 4)
    lost, power, level, count = total.unbind(1)
    found = float((lost / (power - level.square() / count.clamp(min=1)).clamp(min=1e-300)).mean())
    return found if isfinite(found) else inf


def for_trials(captured: Capture, batches: Batches) -> tuple[Batches, Batches]:
    """Batches to fit drafts on that are compared, and batches to judge them on: of the first TRIED samples."""
    some = first_samples(captured, batches, TRIED) if batches else []
    return halves(some, takes_any_batch(captured)) if some else ([], [])


def halves(batches: Batches, divisible: bool) -> tuple[Batches, Batches]:
    """Batches to fit on, and a quarter of the samples to judge on.

    divisible: whether a batch may be cut, as it is where there are fewer than FEWEST. With a single sample, or batches
               that are indivisible and too few, both are all batches
    """
    if len(batches) < FEWEST:
        batches = [part for batch in batches for part in (_cut(batch) if divisible else [batch])]
    last = max(1, len(batches) // 4)
    return (batches[:-last], batches[-last:]) if len(batches) > 1 else (batches, batches)


def _cut(batch: Sequence[Any]) -> Batches:
    bounds = [samples(batch) * number // FEWEST for number in range(FEWEST + 1)]
    return [of_samples(batch, slice(low, high)) for low, high in pairwise(bounds) if high > low]


def _sums(run: PairedRun, visit: Visit, judges: Sequence[Tensor] | None) -> list[Tensor]:
    """By output, sums over batches and entries: of the squared differences, of squares, of entries, and of ones."""
    found: dict[int, Tensor] = {}
    for number, outputs in enumerate(visit.outputs):
        merged = returned(run.merged.call(visit.node, number))
        for place, (y, z) in enumerate(zip(returned(outputs), merged, strict=True)):
            own = difference(run, number, y, z, None if judges is None else judges[number])
            found[place] = found[place] + own if place in found else own
    return list(found.values())


def difference(run: PairedRun, number: int, y: Tensor, z: Tensor, judges: Tensor | None = None) -> Tensor:
    """Sums over the entries of one output, y of the original and z of the merged graph, in the batch with this number:
    of the squared differences, of the squares of y, of y, and of ones, (4,).
    """
    own = None if judges is None else judges.to(y.device)
    real = None if run.padding is None else run.padding.real("output", run.original.batches[number], y.shape)
    if real is not None:
        chosen = real if own is None or len(own) != len(real) else real & own[:, None]
        y, z = (t.reshape(*real.shape, *rest(t.shape, real))[chosen] for t in (y, z))
    elif own is not None and y.dim() and y.size(0) == len(own):
        y, z = (t[own] for t in (y, z))
    y, z = (torch.view_as_real(t) if t.is_complex() else t for t in (y, z))
    parts = [(z.double() - y.double()).square().sum(), y.double().square().sum(), y.double().sum()]
    return torch.stack([*(p.cpu() for p in parts), torch.tensor(float(y.numel()), dtype=torch.float64)])
