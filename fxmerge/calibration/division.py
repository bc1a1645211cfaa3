"""Which samples of refit's data are fitted to, and which judge: those that are held out (see held_out.py).

What judges must not have been fitted to before either: the survey, by which channels are chosen and dropped ones
expressed, leaves the samples out that are held out of refit's solves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.batches import Batches
from fxmerge.calibration.held_out import HELD_OUT, JUDGES, of_samples, sample_folds, samples
from fxmerge.calibration.paired_run import Settings
from fxmerge.calibration.trial_runs import first_samples, refused, takes_any_batch
from fxmerge.ir.capture import Capture

FEWEST = 4  # batches that are divided without cutting one
TRIED = 64  # samples that drafts are fitted to and compared on, at most; at least a batch


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


def comparing(captured: Capture, batches: Batches, settings: Settings) -> tuple[Batches, Batches, list[Tensor] | None]:
    """Batches to fit drafts on that are compared; batches to compare them on, and which of their samples judge, or None
    for all.

    Samples that the survey leaves out judge, and it serves the drafts; where there are none, as in `for_trials`.
    """
    if not any(bool((own == HELD_OUT).any()) for own in sample_folds([samples(b) for b in batches], settings.made)):
        return *for_trials(captured, batches[: settings.made or None]), None
    held, judges = judging(captured, batches, settings)
    if all(bool(own.all()) for own in judges):
        return batches, held, None
    before = accumulate((samples(batch) for batch in held), initial=0)
    count = sum(seen < TRIED for seen in list(before)[:-1])  # whole batches, in which streams are held
    return batches, held[:count], judges[:count]


def solving(captured: Capture, batches: Sequence[Sequence[Any]], made: int) -> list[Sequence[Any]]:
    """The batches without the samples that are held out; all of them if the model does not take such batches.

    made: the number of leading batches whose samples may be held out, or 0 for all
    """
    own = [folds != HELD_OUT for folds in sample_folds([samples(batch) for batch in batches], made)]
    if all(bool(some.all()) for some in own):
        return list(batches)
    chosen = [(batch, some) for batch, some in zip(batches, own, strict=True) if some.any()]
    found = [batch if some.all() else of_samples(batch, some) for batch, some in chosen]
    cut = {samples(part): part for part, (batch, _) in zip(found, chosen, strict=True) if part is not batch}
    return list(batches) if any(refused(captured, batch) for batch in cut.values()) else found


def judging(
    captured: Capture, batches: Sequence[Sequence[Any]], settings: Settings
) -> tuple[list[Sequence[Any]], list[Tensor]]:
    """The batches with samples held out, and which they are; all samples of the first batch if none is held out.

    The other samples are left out if the model takes batches of these alone, unless streams are held and few samples
    would be left to hold them by.
    """
    held = [folds == HELD_OUT for folds in sample_folds([samples(batch) for batch in batches], settings.made)]
    chosen = [(batch, some) for batch, some in zip(batches, held, strict=True) if some.any()]
    if not chosen:
        return [batches[0]], [torch.ones(samples(batches[0]), dtype=torch.bool)]
    enough = not settings.held or sum(int(some.sum()) for _, some in chosen) >= JUDGES
    alone = [of_samples(batch, some) for batch, some in chosen]
    if enough and not any(refused(captured, batch) for batch in {samples(batch): batch for batch in alone}.values()):
        return list(alone), [some[some] for _, some in chosen]
    return [batch for batch, _ in chosen], [some for _, some in chosen]


def _cut(batch: Sequence[Any]) -> Batches:
    bounds = [samples(batch) * number // FEWEST for number in range(FEWEST + 1)]
    return [of_samples(batch, slice(low, high)) for low, high in pairwise(bounds) if high > low]
