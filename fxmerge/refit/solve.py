"""The weights of one layer, solved by least squares from a sample of its output positions.

    W' = argmin |P W' - T|^2 + ridge |W' - W0|^2,   W0 the current weights      (see `least_squares`)

Before a rectifier, the targets T and the weights are computed in turn (see `targets`). Before a BatchNorm, the mean and
the standard deviation of the outputs are then matched to the original's, channel by channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.methods.least_squares import Reduce, system
from fxmerge.refit.targets import Target

MATCH = 2.0  # the factor that matches the standard deviations stays between 1 / MATCH and MATCH
RIDGE = 3e-2  # the pull towards the current weights, as a share of the Gram's mean diagonal; `joint` uses it too
ROUNDS = 6  # of the alternation before a rectifier


@dataclass(frozen=True)
class Rows:
    """A sample of a layer's output positions, by batch."""

    patches: list[Tensor]  # (rows, g, p), of the merged graph
    targets: list[Target]  # (rows, o)


def solution(
    rows: Rows,
    start: Tensor,
    *,
    wanted: tuple[Tensor, Tensor] | None,
    centred: bool,
    reduce: Reduce,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """(W', b'), (g, o, p) and (g, o), for the current weights W0 `start`.

    wanted:   the mean and the variance of the outputs to match, (o,) and (o,); None before anything but a BatchNorm
    centred:  whether the layer may have a bias
    rounds:   of the alternation, where a rectifier follows
    """
    blocks = start.shape[:2]

    def shaped(targets: list[Tensor]) -> list[Tensor]:
        return [t.reshape(len(t), *blocks) for t in targets]

    normal = system(rows.patches, shaped([t.corrected for t in rows.targets]), reduce, centred)
    weight = normal.solve(start, RIDGE)
    bias = normal.intercept(weight, normal.mean_t)
    last, pace = (weight, bias), 1.0
    for _ in range(rounds if any(t.rectified for t in rows.targets) else 0):
        # each round is a gradient step of a convex loss, in the Gram's metric: with FISTA's momentum fewer are needed
        # (Beck & Teboulle, 2009, equations 4.1 to 4.3)
        here, faster = (weight, bias), (1 + (1 + 4 * pace**2) ** 0.5) / 2
        ahead, pace = (pace - 1) / faster, faster
        weight, bias = (now + ahead * (now - then) for now, then in zip(here, last, strict=True))
        last = here
        predicted = [_predict(p, weight, bias) for p in rows.patches]
        moved = [target.given(y) for target, y in zip(rows.targets, predicted, strict=True)]
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


def error(rows: Rows, weight: Tensor, bias: Tensor, reduce: Reduce) -> float:
    """The square error of a layer's outputs over all rows and channels; before a rectifier, of what passes it."""
    found = []
    for patch, target in zip(rows.patches, rows.targets, strict=True):
        predicted = _predict(patch, weight, bias)
        found.append((predicted - target.given(predicted)).double().square().sum())
    return float(reduce(torch.stack(found).sum()))


def _predict(patch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Outputs (rows, o) for patches (rows, g, p), in the patches' precision, but at least float32."""
    patch = patch if patch.dtype == torch.float64 else patch.float()
    out = torch.baddbmm(bias.to(patch)[:, None], patch.transpose(0, 1), weight.to(patch).mT)  # (g, rows, o)
    return out.transpose(0, 1).flatten(1)
