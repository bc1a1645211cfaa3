"""The targets of a layer's outputs in refit, judged by what the layer's epilogue makes of them.

If a layer's outputs have no other consumer, they may pass a BatchNorm, z = gain y + constant; then an add with another
stream, z + s; then a rectifier, which clamps z + s (ReLU to [0, inf), ReLU6 to [0, 6]). Let y be the original's
outputs, of the channels that stay, and let s and s' be the other stream in the original and in the merged graph:

    corrected   y* = y + (s - s') / gain          the layer also makes up for what the other stream has lost so far
    given y'    where the rectifier clamps y* and a prediction y' to the same bound, nothing is wrong: the target is y'
                (the alternation of Zhang et al., "Accelerating very deep convolutional networks", 2015, eq. 7)
    residual    r(y') = (gain y' + constant + s') - (gain y + constant + s); where a rectifier follows and clamps the
                original's term to one of its bounds, only what passes that bound

Channels whose gain is close to zero keep y* = y.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from fxmerge.calibration.epilogue import Affine
from fxmerge.calibration.paired_run import channel_shape
from fxmerge.calibration.rectifiers import Bounds


@dataclass(frozen=True, kw_only=True)
class Residual:
    """r as a function of the outputs y', both shaped like y.

    r = min(max(gain y' + offset, low), high), where each bound is 0 or infinite
    """

    gain: Tensor
    offset: Tensor
    low: Tensor | None
    high: Tensor | None

    def __call__(self, outputs: Tensor) -> Tensor:
        found = torch.addcmul(self.offset, outputs, self.gain)
        found = found if self.low is None else torch.maximum(found, self.low)
        return found if self.high is None else torch.minimum(found, self.high)

    def slope(self, missed: Tensor) -> Tensor:
        """The gradient of |r|^2 / 2 with respect to the outputs, from r: where r is clamped, it is 0."""
        return missed * self.gain


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the outputs of a layer should be for one batch: at sampled positions, (rows, o), or everywhere.

    outputs:    y, the original's outputs, of the channels that stay
    axis:       the axis of the channels in y
    affine:     the gain and the constant of each channel, (o,)
    bounds:     of the rectifier that follows, None without one
    streams:    (s, s'), both shaped like y; None without an add
    """

    outputs: Tensor
    axis: int
    affine: Affine
    bounds: Bounds | None
    streams: tuple[Tensor, Tensor] | None = None

    def rows(self, index: Tensor) -> Target:
        """The target at some of its sampled positions."""
        streams = None if self.streams is None else (self.streams[0][index], self.streams[1][index])
        return replace(self, outputs=self.outputs[index], streams=streams)

    def of_outputs(self, some: slice) -> Target:
        """The target of some outputs at its sampled positions."""
        own = Affine(*(t[some] for t in (self.affine.gain, self.affine.constant, self.affine.inverse)))
        streams = None if self.streams is None else (self.streams[0][:, some], self.streams[1][:, some])
        return replace(self, outputs=self.outputs[:, some], affine=own, streams=streams)

    @cached_property
    def corrected(self) -> Tensor:
        """y*"""
        if self.streams is None:
            return self.outputs
        before, now = self.streams
        return self.outputs + (before - now) * self._channels(self.affine.inverse, self.outputs)

    def given(self, predicted: Tensor) -> Tensor:
        """The target for a prediction: y*, but the prediction itself where a rectifier clamps both to one bound."""
        target = self.corrected
        if self.bounds is None:
            return target
        least, most = self.bounds
        gain, constant, inverse = (
            self._channels(t, target) for t in (self.affine.gain, self.affine.constant, self.affine.inverse)
        )
        shift = constant if self.streams is None else constant + self.streams[1]
        wanted, found = gain * target + shift, gain * predicted + shift
        aim = torch.where(wanted > least, wanted, found.clamp(max=least))
        aim = torch.where(wanted < most, aim, found.clamp(min=most))
        return torch.where(inverse == 0, target, (aim - shift) * inverse)

    def residual(self) -> Residual:
        """r as a function of the outputs. It holds one to three tensors shaped like y, and not those of the target."""
        gain, constant = (self._channels(t, self.outputs) for t in (self.affine.gain, self.affine.constant))
        wanted = torch.addcmul(constant, self.outputs, gain)
        shift = constant.expand_as(wanted)
        if self.streams is not None:
            before, now = self.streams
            wanted, shift = wanted + before, shift + now
        if self.bounds is None:
            offset, low, high = shift - wanted, None, None
        else:
            least, most = self.bounds
            offset = shift - wanted.clamp(least, most)
            low = torch.where(wanted > least, -torch.inf, 0.0).to(wanted)
            high = torch.where(wanted < most, torch.inf, 0.0).to(wanted) if isfinite(most) else None

        return Residual(gain=gain, offset=offset, low=low, high=high)

    def _channels(self, vector: Tensor, like: Tensor) -> Tensor:
        """A number for each channel, (o,), in the dtype of `like` and shaped to broadcast along its channels."""
        return vector.to(like).view(channel_shape(self.axis, like.dim()))
