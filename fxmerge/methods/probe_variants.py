"""Variants of real samples: probes that are made of the example inputs.

The crops of a single image can be enough to distil a network if they vary (Asano & Saeed, "Extrapolating from a single
image to a thousand classes using distillation", ICLR 2023). Sample i of `count` is a variant of sample i % n of the
given (n, ...), so that several inputs of one sample stay together; generators with the same seed change them alike.

    images     crops, resized, turned a little and flipped; contrast, brightness and colour changed; patches of other
               places pasted over half of them
    sequences  moved and stretched along the axis of steps, with the start following the end; scaled; mixed with noise
    features   each sample, moved by the difference between two others (a smoothed bootstrap)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from fxmerge.methods.probe_families import leaf, leaves, pink, white
from fxmerge.methods.probe_statistics import axis_of_steps, is_image, looks_real, placed

NARROW, LESS = 0.25, 0.6  # the smallest side of a crop, as a share of the image's: of probes; of the user's own data
TURN = 0.2  # the deviation of a crop's angle, in radians
PATCHES = 3
BILINEAR, REFLECTION = 0, 2  # as torch.grid_sampler counts them
CHUNK = 64  # images that are cropped at once, to bound the memory for their grids
STRETCH, NOISE, JITTER = 1.25, 0.5, 0.5


def example(example: Tensor, count: int, generator: Generator) -> Tensor:
    """The example (n, ...), then variants of it and, in turn, leaves or noise with its statistics: (count, ...).

    `leaves` alone, if the example is noise or constant.
    """
    return _in_turn(example, count, generator, lambda x: placed(x, _unlike(x, count, generator)))


def alike(example: Tensor, count: int, generator: Generator) -> Tensor:
    """The example (n, ...), then in turn its samples, flipped or moved but otherwise as they are, and variants of them.

    `leaves` alone, if the example is noise or constant.
    """
    return _in_turn(example, count, generator, lambda x: _flipped(x[torch.arange(count) % len(x)], generator))


def _in_turn(example: Tensor, count: int, generator: Generator, others: Callable[[Tensor], Tensor]) -> Tensor:
    """Each sample of the example, then a variant of each, then as many of `others`, and so on: (count, ...).

    `leaves` alone, if the example is noise or constant.
    """
    x = example.detach().float().cpu()
    if not looks_real(x):
        return placed(x, leaves(x, count, generator))
    order = torch.arange(count) // len(x)
    made = torch.where(_along(order % 2 == 0, x), others(x), _varied(x, count, generator))
    made[: min(len(x), count)] = x[:count]
    return made


def _flipped(x: Tensor, generator: Generator) -> Tensor:
    """Images flipped sideways at random, sequences moved along their steps, features as they are."""
    if is_image(x):
        return torch.where(_along(torch.rand(len(x), generator=generator) < 0.5, x), x.flip(-1), x)
    steps = axis_of_steps(x)
    return x if steps is None else moved(x, steps, generator, stretch=1.0)


def augmented(values: Tensor, count: int, generator: Generator) -> Tensor | None:
    """`count` further variants of the user's samples (n, ...), which stay close to them; None if none can be made.

    Images are cropped and flipped, sequences are moved along their steps. Features, (n, numbers) of any kind, and noise
    have no variants.
    """
    x = values.detach()
    if not x.is_floating_point() or x.dim() < 3 or not looks_real(x):
        return None
    x, chosen = x.float().cpu(), torch.arange(count) % len(x)
    if is_image(x):
        return cropped(x[chosen], generator, narrow=LESS, turn=0.0)
    steps = axis_of_steps(x)
    return None if steps is None else moved(x[chosen], steps, generator, stretch=1.0)


def _unlike(x: Tensor, count: int, generator: Generator) -> Tensor:
    """Standard numbers without the example's content. For features: sums of all samples with random factors, which
    have the covariance of the samples, and some independent noise where samples are few.
    """
    if x.dim() > 2 or axis_of_steps(x) is not None:
        return leaves(x, count, generator) if is_image(x) else _noise(x, count, generator)
    apart = (x - x.mean(0)) / x.std(0).clamp(min=1e-12)
    mixed = torch.randn(count, len(x), generator=generator) @ apart / len(x) ** 0.5
    alone = x.size(1) / (x.size(1) + len(x))  # the share of independent noise
    drawn: Tensor = (1 - alone) ** 0.5 * mixed + alone**0.5 * white(x, count, generator)
    return drawn


def _noise(x: Tensor, count: int, generator: Generator) -> Tensor:
    """`pink` along the axis of steps, which may be before that of the features."""
    if x.dim() == 3 and axis_of_steps(x) == 1:
        return pink(x.transpose(1, 2), count, generator).transpose(1, 2)
    return pink(x, count, generator)


def _varied(x: Tensor, count: int, generator: Generator) -> Tensor:
    """Variants of x (n, ...) with much variety, within the range of x: (count, ...)."""
    source, n = x[torch.arange(count) % len(x)], len(x)
    if is_image(x):
        return coloured(pasted(cropped(source, generator), source, generator), generator)
    steps = axis_of_steps(x)
    if steps is None:
        one, two = (x[torch.randint(n, (count,), generator=generator)] for _ in range(2))
        apart = source - x.mean(0) + JITTER * (one - two) / 2**0.5
        jittered: Tensor = x.mean(0) + apart / (1 + JITTER**2) ** 0.5
        return jittered.clamp(x.min(), x.max())
    out = moved(source, steps, generator, stretch=STRETCH)
    draw = _along(torch.rand(count, generator=generator), x)
    gain = 2 ** (0.5 * _along(torch.randn(count, generator=generator), x))
    share = NOISE * draw * (_along(torch.rand(count, generator=generator), x) < 0.5)
    out = (1 - share) * gain * out + share * placed(x, _noise(x, count, generator))
    return out.clamp(x.min(), x.max())


def cropped(images: Tensor, generator: Generator, *, narrow: float = NARROW, turn: float = TURN) -> Tensor:
    """A crop of each image, resized to its size: (n, channels, h, w). Half of them are flipped sideways."""
    count, ratio = len(images), images.size(3) / images.size(2)
    draw, angle = torch.rand(5, count, generator=generator), turn * torch.randn(count, generator=generator)
    side, aspect = narrow ** draw[0], (4 / 3) ** (draw[1] - 0.5)
    across, down = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    mirror, sine, cosine = torch.where(draw[2] < 0.5, -1.0, 1.0), angle.sin(), angle.cos()
    rows = [
        torch.stack([across * cosine * mirror, -down * sine / ratio, (1 - across) * (2 * draw[3] - 1)], 1),
        torch.stack([across * sine * mirror * ratio, down * cosine, (1 - down) * (2 * draw[4] - 1)], 1),
    ]
    found = []
    for part, theta in zip(torch.split(images, CHUNK), torch.split(torch.stack(rows, 1), CHUNK), strict=True):
        grid = torch.affine_grid_generator(theta.to(part), list(part.shape), align_corners=False)
        found.append(torch.grid_sampler(part, grid, BILINEAR, REFLECTION, align_corners=False))
    return torch.cat(found)


def pasted(images: Tensor, sources: Tensor, generator: Generator) -> Tensor:
    """The images, PATCHES discs and boxes of other crops over half of them."""
    count, _, height, width = images.shape
    half = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    for number in range(PATCHES):
        inside = leaf(count, height, width, generator) & half
        images = torch.where(inside, cropped(sources.roll(number + 1, 0), generator), images)
    return images


def coloured(images: Tensor, generator: Generator) -> Tensor:
    """The images with other contrast, brightness and colours, within their range."""
    count, channels = images.shape[:2]
    mean, spread = images.mean((2, 3), keepdim=True), images.std()
    contrast = 2 ** (0.5 * torch.randn(count, 1, 1, 1, generator=generator))
    shift = 0.25 * torch.randn(count, 1, 1, 1, generator=generator)
    shift = spread * (shift + 0.12 * torch.randn(count, channels, 1, 1, generator=generator))
    return ((images - mean) * contrast + mean + shift).clamp(images.min(), images.max())


def moved(x: Tensor, steps: int, generator: Generator, *, stretch: float) -> Tensor:
    """Each sample, moved and stretched (by up to `stretch`) along the axis `steps`; its start follows its end."""
    length, count = x.size(steps), len(x)
    start = length * torch.rand(count, 1, generator=generator)
    pace = stretch ** (2 * torch.rand(count, 1, generator=generator) - 1)
    if stretch == 1:
        start = start.floor()
    place = start + pace * torch.arange(length)
    low, part = place.floor().long(), place - place.floor()
    lines = x.movedim(steps, 1)
    sample = torch.arange(count)[:, None]
    one, two = lines[sample, low % length], lines[sample, (low + 1) % length]
    weight = part.reshape(count, length, *[1] * (lines.dim() - 2))
    return torch.lerp(one, two, weight.to(one)).movedim(1, steps)


def _along(values: Tensor, x: Tensor) -> Tensor:
    """(count,) as it broadcasts along the samples of x."""
    return values.reshape(-1, *[1] * (x.dim() - 1))
