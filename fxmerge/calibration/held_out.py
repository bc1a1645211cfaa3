"""Samples that are held out of refit's solves, to judge them.

Positions of one sample resemble each other, so that whole samples are held out. The samples are dealt into FOLDS folds,
and the last fold is held out: one sample in FOLDS, but not many more than JUDGES in all. Where the last fold has few
positions, each of the folds judges in turn (see `refit.solve`). Variants of the user's samples are in no fold: they
never judge, and none is made of a sample that is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.patches import Form, positions
from fxmerge.calibration.sample_run import SampleRun
from fxmerge.methods.probes import sample_axis

FOLDS, JUDGES = 8, 32
HELD_OUT, NO_FOLD = FOLDS - 1, -1


def samples(batch: Sequence[Any]) -> int:
    """The number of samples in a batch: the first axis of its first tensor; 1 for a run of the user's own code."""
    if isinstance(batch, SampleRun):
        return 1
    return next((v.size(0) for v in batch if isinstance(v, Tensor) and v.dim()), 1)


def of_samples(batch: Sequence[Any], index: Tensor | slice) -> Sequence[Any]:
    """The samples of a batch with these indices, or those where a mask is True; a view for a slice.

    A run of the user's own code is not divided.
    """
    if isinstance(batch, SampleRun):
        return batch
    count = samples(batch)

    def some(value: Any) -> Any:
        if (axis := sample_axis(value, count)) is None:
            return value
        own = index if isinstance(index, slice) else index.to(value.device)
        return value[:, own] if axis else value[own]

    return [some(value) for value in batch]


def sample_folds(counts: Sequence[int], made: int = 0) -> list[Tensor]:
    """The fold of each sample, (samples,) by batch; NO_FOLD for all if there are fewer than 2 FOLDS.

    counts: the samples of each batch; made: the number of leading batches whose samples may judge, or 0 for all
    """
    made = made or len(counts)
    total = sum(counts[:made])
    every, first, found = max(FOLDS, total // JUDGES), 0, []
    for number, count in enumerate(counts):
        place = torch.arange(first, first + count) % every
        fold = torch.where(place == every - 1, HELD_OUT, place % HELD_OUT)
        found.append(fold if number < made and total >= 2 * FOLDS else torch.full_like(fold, NO_FOLD))
        first += count
    return found


def position_folds(
    outputs: Sequence[Tensor], form: Form, index_of: Sequence[Tensor], samples: Sequence[Tensor]
) -> list[Tensor]:
    """The folds of the output positions with these indices, (rows,) by batch.

    samples: the fold of each sample, by batch; if none is held out, each output is divided into folds along its
             positions
    """
    some, found = any(bool((folds == HELD_OUT).any()) for folds in samples), []
    for y, index, folds in zip(outputs, index_of, samples, strict=True):
        count = positions(y, form)
        if not some:  # of fewer positions than folds none is held out
            found.append(index * FOLDS // count if count >= FOLDS else torch.full_like(index, NO_FOLD))
        elif len(folds) and count % len(folds) == 0:
            found.append(folds.to(index.device)[index // max(1, count // len(folds))])
        else:
            found.append(torch.full_like(index, NO_FOLD))
    return found
