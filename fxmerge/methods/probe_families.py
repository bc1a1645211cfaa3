"""Families of probes that need no data: numbers with mean 0 and deviation 1, in the shape of an example.

The example is one of the model's floating-point inputs, (batch, ...). Each function returns (count, ...).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

LEAVES = 24  # shapes in each image
SMALLEST, LARGEST = 1 / 16, 1 / 1.5  # radii of the shapes, as shares of an image's height


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
    image, texture = pink(example, count, generator), pink(example, count, generator)
    for _ in range(LEAVES):
        inside = leaf(count, shape[1], shape[2], generator)
        colour = torch.randn(count, 1, 1, 1, generator=generator)
        colour = colour + 0.4 * torch.randn(count, shape[0], 1, 1, generator=generator)
        image = torch.where(inside, colour, image)
    return standard(image + 0.2 * texture)


def leaf(count: int, height: int, width: int, generator: Generator) -> Tensor:
    """A disc or a box of random size, place and angle in each image: whether a pixel is inside, (count, 1, h, w)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    least, most = SMALLEST * height, LARGEST * height
    draw = torch.rand(6, count, 1, 1, generator=generator)
    radius = (least**-2 + draw[0] * (most**-2 - least**-2)) ** -0.5  # density r^-3: the same at every scale
    down, across = rows - height * (1.2 * draw[1] - 0.1), columns - width * (1.2 * draw[2] - 0.1)
    angle, aspect = torch.pi * draw[3], (0.5 + 1.5 * draw[4]).sqrt()
    along = (across * angle.cos() + down * angle.sin()) / radius * aspect
    athwart = (down * angle.cos() - across * angle.sin()) / radius / aspect
    along, athwart = along.square_(), athwart.square_()
    box = (draw[5] >= 0.5).flatten()  # the others are discs
    along[box], athwart[box] = along[box].square().square(), athwart[box].square().square()
    return (along.add_(athwart) < 1)[:, None]


def standard(x: Tensor) -> Tensor:
    """x, shifted and scaled to mean 0 and standard deviation 1 over all its elements."""
    return (x - x.mean()) / x.std().clamp(min=1e-12) if x.numel() > 1 else x
