"""Probes: synthetic inputs that refit runs on where no calibration data is given.

PROBES maps the name of a family to a function of (example, count, generator). The example is one of the model's
floating-point inputs, (batch, ...). The function returns (count, ...) with mean 0 and standard deviation 1. After
BatchNorms that use the original's batch statistics (`paired_run`), the family hardly matters, as each layer sees the
statistics that it had in training. `fit_probes.mismatch` with the running statistics chooses the family.

    white   independent Gaussian numbers
    pink    a spectrum of 1/f over the spatial axes, as images have, half of it common to all channels (Field, 1987)
    leaves  textured discs and boxes of random sizes that cover each other, which have edges (the dead leaves of Lee et
            al., 2001)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Generator, Tensor

LEAVES = 24  # shapes in each image


def white(example: Tensor, count: int, generator: Generator) -> Tensor:
    """Independent Gaussian numbers: (count, ...)."""
    return torch.randn(count, *example.shape[1:], generator=generator)


def pink(example: Tensor, count: int, generator: Generator) -> Tensor:
    """Numbers with a spectrum of 1/f over the spatial axes, (count, ...); `white` for inputs without such axes."""
    shape = tuple(example.shape[1:])
    if len(shape) < 2:  # features without spatial axes
        return white(example, count, generator)
    channels, sizes = shape[0], shape[1:]
    axes = tuple(range(-len(sizes), 0))
    grids = torch.meshgrid(*(torch.fft.fftfreq(s) for s in sizes), indexing="ij")
    frequency = torch.stack(grids).square().sum(0).sqrt()
    amplitude = 1 / frequency.clamp(min=1 / max(sizes))

    def field(width: int) -> Tensor:
        noise = torch.randn(count, width, *sizes, generator=generator)
        return standard(torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) * amplitude, dim=axes).real)

    mixed = field(1).expand(-1, channels, *sizes) + field(channels)
    return standard(mixed.reshape(count, *shape))


def leaves(example: Tensor, count: int, generator: Generator) -> Tensor:
    """Images of discs and boxes that cover each other, (count, channels, h, w); `pink` for inputs of other shapes."""
    shape = tuple(example.shape[1:])
    if len(shape) != 3:
        return pink(example, count, generator)
    channels, height, width = shape
    image, texture = pink(example, count, generator), pink(example, count, generator)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    least, most = height / 16, height / 1.5
    for _ in range(LEAVES):
        draw = torch.rand(6, count, 1, 1, generator=generator)
        radius = (least**-2 + draw[0] * (most**-2 - least**-2)) ** -0.5  # density r^-3: the same at every scale
        down, across = rows - height * (1.2 * draw[1] - 0.1), columns - width * (1.2 * draw[2] - 0.1)
        angle, aspect = torch.pi * draw[3], (0.5 + 1.5 * draw[4]).sqrt()
        along = (across * angle.cos() + down * angle.sin()) / radius * aspect
        athwart = (down * angle.cos() - across * angle.sin()) / radius / aspect
        power = torch.where(draw[5] < 0.5, 2.0, 8.0)  # a disc or a box
        inside = (along.abs() ** power + athwart.abs() ** power < 1)[:, None]
        colour = torch.randn(count, 1, 1, 1, generator=generator)
        colour = colour + 0.4 * torch.randn(count, channels, 1, 1, generator=generator)
        image = torch.where(inside, colour, image)
    return standard(image + 0.2 * texture)


def standard(x: Tensor) -> Tensor:
    """x, shifted and scaled to mean 0 and standard deviation 1 over all its elements."""
    return (x - x.mean()) / x.std().clamp(min=1e-12) if x.numel() > 1 else x


PROBES: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {"pink": pink, "white": white, "leaves": leaves}


def tokens(example: Tensor, vocabulary: int, count: int, generator: Generator) -> Tensor:
    """Token ids drawn by Zipf's law, with the ids ranked at random: (count, ...)."""
    rank = torch.randperm(vocabulary, generator=generator)
    weight = 1 / (1 + torch.arange(vocabulary, dtype=torch.float64))
    drawn = torch.multinomial(weight, count * prod(example.shape[1:]), replacement=True, generator=generator)
    return rank[drawn].reshape(count, *example.shape[1:]).to(example.dtype)


def probed(inputs: Sequence[object]) -> list[int]:
    """The indices of the inputs that get numbers of a family: floating-point tensors with an axis of samples."""
    first = next((v for v in inputs if isinstance(v, Tensor) and v.dim()), None)
    return [
        place
        for place, v in enumerate(inputs)
        if isinstance(v, Tensor) and v.is_floating_point() and first is not None and v.shape[:1] == first.shape[:1]
    ]


def probes(
    family: str, inputs: list[object], *, vocabularies: Mapping[int, int], count: int, batch: int, seed: int
) -> list[list[object]]:
    """`count` samples in batches of `batch`: by batch, values for a graph's placeholders, like the example's `inputs`.

    An input whose first axis is the example's batch gets new content: token ids if its number is in `vocabularies`
    (placeholder number -> vocabulary size), numbers of the family if it is floating-point, and otherwise the example's
    content, repeated. An input with another first axis, or that is not a tensor, is used unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next((v for v in inputs if isinstance(v, Tensor) and v.dim()), None)
    if first is None:
        return [inputs]
    sizes, drawn_anew = [min(batch, count - start) for start in range(0, count, batch)], probed(inputs)

    def made(number: int, value: object) -> list[object]:
        if not isinstance(value, Tensor) or not value.dim() or value.size(0) != first.size(0):
            return [value] * len(sizes)
        if number in vocabularies:
            drawn = tokens(value, vocabularies[number], count, generator)
        elif number in drawn_anew:
            drawn = PROBES[family](value, count, generator)
        else:
            drawn = value.cpu().repeat(-(-count // len(value)), *[1] * (value.dim() - 1))[:count]
        return list(torch.split(drawn.to(value), sizes))

    columns = [made(number, value) for number, value in enumerate(inputs)]
    return [list(row) for row in zip(*columns, strict=True)]
