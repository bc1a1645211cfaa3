"""Samples that are held out of refit's solves, to judge them.

Positions of one sample resemble each other, so that whole samples are held out, at regular distances: one of HELD, but
not many more than JUDGES in all. Variants of the user's samples never judge, and none is made of a sample that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.patches import Form, positions

HELD, JUDGES = 8, 32


def samples(batch: Sequence[Any]) -> int:
    """The number of samples in a batch: the first axis of its first tensor."""
    return next((v.size(0) for v in batch if isinstance(v, Tensor) and v.dim()), 1)


def held_samples(counts: Sequence[int], made: int = 0) -> list[Tensor]:
    """Which samples are held out, (samples,) bool by batch; none if there are fewer than 2 HELD.

    counts: the samples of each batch; made: the number of leading batches whose samples may judge, or 0 for all
    """
    made = made or len(counts)
    total = sum(counts[:made])
    every, first, found = max(HELD, total // JUDGES), 0, []
    for number, count in enumerate(counts):
        index = torch.arange(first, first + count)
        judges = number < made and total >= 2 * HELD
        found.append(index % every == every - 1 if judges else torch.zeros(count, dtype=torch.bool))
        first += count
    return found


def held_positions(
    outputs: Sequence[Tensor], form: Form, index_of: Sequence[Tensor], samples: Sequence[Tensor]
) -> list[Tensor]:
    """Which of the output positions with these indices are held out, (rows,) bool by batch.

    samples: which samples are held out, by batch; if none is, the last positions of each output are
    """
    some, found = any(bool(held.any()) for held in samples), []
    for y, index, held in zip(outputs, index_of, samples, strict=True):
        count = positions(y, form)
        if not some:
            found.append(index >= count - count // HELD)
        elif len(held) and count % len(held) == 0:
            found.append(held.to(index.device)[index // max(1, count // len(held))])
        else:
            found.append(torch.zeros(len(index), dtype=torch.bool, device=index.device))
    return found
