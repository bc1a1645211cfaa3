"""What an example input says about the data: where its numbers lie, and whether it is data at all or noise."""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 16  # with fewer numbers in each channel, the statistics are those of the whole tensor
LIKE = 0.25  # the correlation of neighbours above which numbers are no noise; images have 0.8 and more
LONG = 64  # the least length of a sequence without features
EQUAL = 0.3  # the share of equal numbers above which they are no noise (one-hot codes, spikes)


def is_image(x: Tensor) -> bool:
    """Whether x is laid out as images are: (n, channels, h, w), with sides that differ by a factor of 2 at most."""
    return x.dim() == 4 and min(x.shape[2:]) > 1 and max(x.shape[2:]) <= 2 * min(x.shape[2:])


def is_constant(x: Tensor) -> bool:
    """Whether all numbers are equal, or some are not finite, so that they say nothing about data."""
    return x.numel() == 0 or not bool(torch.isfinite(x).all()) or bool(x.max() == x.min())


def neighbours(x: Tensor, axis: int) -> float:
    """The correlation of neighbours along an axis, within lines along this axis: about 0 for independent numbers."""
    if x.size(axis) < 3:
        return 0.0
    apart = x - x.mean(axis, keepdim=True)
    one, two = apart.narrow(axis, 0, x.size(axis) - 1), apart.narrow(axis, 1, x.size(axis) - 1)
    return float((one * two).sum() / (one.norm() * two.norm()).clamp(min=1e-30))


def axis_of_steps(x: Tensor) -> int | None:
    """The axis along which the numbers are a sequence, the one whose neighbours are most alike; None for features.

    Of (n, numbers), only a few samples of many numbers are sequences, as of audio: more samples tell more as features.
    """
    if x.dim() < 2:
        return None
    if x.dim() > 3:
        return max(range(2, x.dim()), key=lambda axis: x.size(axis))
    likeness = {axis: neighbours(x, axis) for axis in range(1, x.dim())}
    best = max(likeness, key=lambda axis: likeness[axis])
    long = x.dim() == 3 or (len(x) < FEW and x.size(1) >= LONG and likeness[best] > 2 * LIKE)
    return best if long else None


def looks_real(example: Tensor) -> bool:
    """Whether an example (batch, ...) is data and not noise or a constant: its neighbours are alike, or many numbers
    are equal. Features without an order, (batch, features), cannot be told from noise; they count as data from FEW
    samples on.
    """
    x = example.detach().float()
    if x.dim() < 2 or is_constant(x):
        return False
    if x.dim() == 2 and axis_of_steps(x) is None:
        return len(x) >= FEW
    noise = 4 / x.numel() ** 0.5  # four deviations of the correlation of independent numbers
    alike = max(neighbours(x, axis) for axis in (range(2, x.dim()) if x.dim() > 3 else range(1, x.dim())))
    flat = x.flatten()
    return alike > max(LIKE, noise) or float((flat == flat.mode().values).float().mean()) > EQUAL


def placed(example: Tensor, drawn: Tensor) -> Tensor:
    """Standard numbers (count, ...), moved to the mean and the deviation of each channel of the example.

    They stay within the example's range. A channel that is constant gets the deviation of the whole tensor: another
    input may have other values there. A constant example says nothing, and the numbers are returned as they are.
    """
    x = example.detach().float().cpu()
    if is_constant(x) or x.numel() < 2:
        return drawn
    axes = _others(x)
    mean, deviation = x.mean(axes, keepdim=True), x.std(axes, keepdim=True)
    apart = drawn - drawn.mean(axes, keepdim=True)
    scale = drawn.std(axes, keepdim=True) if drawn.numel() > 1 else torch.ones(())
    spread = torch.where(deviation > 1e-6 * x.std(), deviation, x.std())
    low, high = x.min(), x.max()
    if x.numel() < FEW**2:  # so few numbers do not show the range, only that none is negative
        low, high = (x.new_zeros(()) if low >= 0 else x.new_tensor(-torch.inf)), x.new_tensor(torch.inf)
    return (apart / scale.clamp(min=1e-12) * spread + mean).clamp(low, high)


def _others(x: Tensor) -> tuple[int, ...]:
    """The axes over which the statistics of a channel are taken: all but that of the channels, or all."""
    steps = axis_of_steps(x) if x.dim() == 3 else None
    channels = 3 - steps if steps is not None else 1
    enough = x.dim() > 1 and x.numel() // x.size(channels) >= FEW
    return tuple(axis for axis in range(x.dim()) if axis != channels or not enough)
