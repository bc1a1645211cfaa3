"""Targets: what a layer ought to put out, judged by what its outputs meet next.

Behind a layer stand, where its outputs have no other consumer: a BatchNorm, z = gain y + constant; a sum with another
stream, z + s; a rectifier, max(z + s, 0). With y the original's outputs (rows that stay), s and s' the other stream of
the original and of the merged graph:

    residual    y* = y + (s - s') / gain           the layer also makes good what the other stream has lost so far
    rectified   where y* and the prediction both end up below zero nothing is wrong: the target is the prediction there
                (the alternation of Zhang et al., "Accelerating very deep convolutional networks", 2015, eq. 7)

Channels of next to no gain keep y* = y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmerge.calibration.epilogue import Affine


def residual(target: Tensor, step: Affine, before: Tensor, now: Tensor) -> Tensor:
    """y* for rows of y (rows, o), and of the other stream, the original's and the merged graph's."""
    return target + (before - now) * step.inverse.to(target)


def rectified(target: Tensor, predicted: Tensor, step: Affine, now: Tensor | None) -> Tensor:
    """y* where a rectifier follows: (rows, o) of targets and predictions, the merged graph's other stream."""
    gain, constant, inverse = (t.to(target) for t in (step.gain, step.constant, step.inverse))
    shift = constant if now is None else constant + now
    wanted, found = gain * target + shift, gain * predicted + shift
    aim = torch.where(wanted > 0, wanted, found.clamp(max=0))
    return torch.where(inverse == 0, target, (aim - shift) * inverse)


class Goal:
    """What the last layer's outputs y ought to come to for one batch: gain y + offset = wanted, tensors shaped like y.

    Behind a rectifier any value up to zero is as good as another.
    """

    def __init__(self, gain: Tensor, offset: Tensor, wanted: Tensor, rectified: bool) -> None:
        self.gain = gain
        self.offset = offset - (wanted.clamp(min=0) if rectified else wanted)
        self.least = torch.where(wanted > 0, -torch.inf, 0.0).to(wanted) if rectified else None

    def missed(self, outputs: Tensor) -> Tensor:
        """r"""
        found = torch.addcmul(self.offset, outputs, self.gain)
        return found if self.least is None else torch.maximum(found, self.least)
