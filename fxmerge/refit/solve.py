"""Solving: the weights of one layer from a sample of its output positions.

    W' = argmin |P W' - T|^2 + ridge |W' - W0|^2, W0 the weight that is there (`systems`)

Where a rectifier follows, targets and weights alternate (`targets`); where a BatchNorm follows, mean and deviation of
the outputs are then matched to the original's, channel by channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.calibration import epilogue
from fxmerge.methods.least_squares import Reduce, system
from fxmerge.refit import targets as aims

MATCH = 2.0  # the moment matching's factor stays between 1 / MATCH and MATCH
RIDGE = 3e-2  # the pull towards the weights that are there, of the Gram's mean diagonal
ROUNDS = 6  # of the alternation behind a rectifier


@dataclass(frozen=True)
class Rows:
    """A sample of a layer's output positions, by batch."""

    patches: list[Tensor]  # (rows, g, p)
    targets: list[Tensor]  # (rows, o), corrected by the other stream
    others: list[Tensor | None]  # (rows, o) of the merged graph's other stream


def solution(
    rows: Rows,
    start: Tensor,
    affine: epilogue.Affine,
    rectified: bool,
    wanted: tuple[Tensor, Tensor] | None,
    centred: bool,
    reduce: Reduce,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """(W', b') for W0 `start`, (g, o, p) and (g, o); wanted: mean and variance of the outputs, (o,), (o,)."""
    blocks = start.shape[:2]

    def shaped(targets: list[Tensor]) -> list[Tensor]:
        return [t.reshape(len(t), *blocks) for t in targets]

    normal = system(rows.patches, shaped(rows.targets), reduce, centred)
    weight = normal.solve(start, RIDGE)
    bias = normal.intercept(weight, normal.mean_t)
    last, pace = (weight, bias), 1.0
    for _ in range(rounds if rectified else 0):
        # each round is a gradient step of a convex loss, in the Gram's metric: FISTA's momentum makes fewer do
        # (Beck & Teboulle, 2009, equations 4.1 to 4.3)
        here, faster = (weight, bias), (1 + (1 + 4 * pace**2) ** 0.5) / 2
        ahead, pace = (pace - 1) / faster, faster
        weight, bias = (now + ahead * (now - then) for now, then in zip(here, last, strict=True))
        last = here
        predicted = [_predict(p, weight, bias) for p in rows.patches]
        moved = [
            aims.rectified(t, y, affine, now) for t, y, now in zip(rows.targets, predicted, rows.others, strict=True)
        ]
        normal = normal.with_targets(rows.patches, shaped(moved), reduce)
        weight = normal.solve(weight, RIDGE)
        bias = normal.intercept(weight, normal.mean_t)
    if wanted is not None and centred:
        mean, variance = (t.view(blocks) for t in wanted)
        own = normal.variance(weight)
        factor = (variance / own.clamp(min=1e-300)).sqrt().clamp(1 / MATCH, MATCH)
        weight = weight * torch.where(own > 0, factor, 1)[:, :, None]
        bias = normal.intercept(weight, mean)
    return weight, bias


def error(rows: Rows, weight: Tensor, bias: Tensor, affine: epilogue.Affine, rectified: bool, reduce: Reduce) -> float:
    """Square error of a solution, over all rows and channels; behind a rectifier, of what passes it."""
    found = []
    for patch, target, now in zip(rows.patches, rows.targets, rows.others, strict=True):
        predicted = _predict(patch, weight, bias)
        if rectified:
            target = aims.rectified(target, predicted, affine, now)
        found.append((predicted - target).double().square().sum())
    return float(reduce(torch.stack(found).sum()))


def _predict(patch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Outputs (rows, o) for patches (rows, g, p), in the patches' precision, float32 at least."""
    patch = patch if patch.dtype == torch.float64 else patch.float()
    out = torch.baddbmm(bias.to(patch)[:, None], patch.transpose(0, 1), weight.to(patch).mT)  # (g, rows, o)
    return out.transpose(0, 1).flatten(1)
