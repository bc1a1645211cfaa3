"""How far the outputs of a merged graph are from those of the original, on some of refit's batches."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.padding import rest
from fxmerge.calibration.paired_run import Pair, PairedRun, Settings, Visit
from fxmerge.calibration.words import scores_words
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.outputs import returned
from fxmerge.methods.least_squares import Reduce

SCORES = 2**22  # of words that are compared at a time, to bound the memory


def output_error(
    pair: Pair, batches: Sequence[Sequence[Any]], settings: Settings, judges: Sequence[Tensor] | None = None
) -> float:
    """The relative square error of the merged graph's outputs, as shares of their variances: the mean over all outputs.

    judges: (samples,) bool by batch: the samples that count; all by default

    Where an output scores words, it is the divergence of the distributions, as a share of what the original's tell.

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
    found = [_share(reduce(total)) for total in sums]
    mean = sum(found) / max(len(found), 1)
    return mean if isfinite(mean) else inf


def _share(total: Tensor) -> float:
    """The relative error of one output from the sums of `difference`."""
    lost, power, count, *_ = total.unbind()
    level = total[3:] / count.clamp(min=1)
    whole = (
        power - count * level.square().sum()
        if len(level) == 1
        else count * float(torch.special.entr(level).sum()) - power
    )
    return float(lost.clamp(min=0) / whole.clamp(min=1e-300))  # rounding leaves divergences just below 0


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
    of the squared differences, of the squares of y, of ones, and of y, (4,).

    Of scores of words: of the divergences of their distributions, KL(y | z), of the entropies of y, of ones, and of the
    distributions of y, (3 + words,): the share that is lost of what y tells of the words.
    """
    own = None if judges is None else judges.to(y.device)
    real = None if run.padding is None else run.padding.real("output", run.original.batches[number], y.shape)
    if real is not None:
        chosen = real if own is None or len(own) != len(real) else real & own[:, None]
        y, z = (t.reshape(*real.shape, *rest(t.shape, real))[chosen] for t in (y, z))
    elif own is not None and y.dim() and y.size(0) == len(own):
        y, z = (t[own] for t in (y, z))
    if scores_words(y, run.words):
        return _of_words(y.flatten(0, -2), z.flatten(0, -2))
    y, z = (torch.view_as_real(t) if t.is_complex() else t for t in (y, z))
    parts = [(z.double() - y.double()).square().sum(), y.double().square().sum()]
    return torch.stack([*(p.cpu() for p in parts), torch.tensor(float(y.numel())).double(), y.double().sum().cpu()])


def _of_words(y: Tensor, z: Tensor) -> Tensor:
    """`difference` of scores (rows, words)."""
    lost = entropy = torch.zeros(1, dtype=torch.float64, device=y.device)
    whole = torch.zeros(y.size(-1), dtype=torch.float64, device=y.device)
    rows = max(1, SCORES // y.size(-1))
    for own, other in zip(torch.split(y, rows), torch.split(z, rows), strict=True):
        logs, others = own.float().log_softmax(-1), other.float().log_softmax(-1)
        shares = logs.exp()
        lost = lost + (shares * (logs - others)).sum(-1).double().sum()
        entropy = entropy - (shares * logs).sum(-1).double().sum()
        whole = whole + shares.sum(0, dtype=torch.float64)
    return torch.cat([lost, entropy, torch.full_like(lost, len(y)), whole]).cpu()
