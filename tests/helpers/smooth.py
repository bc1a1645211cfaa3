"""Noise that looks like data."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def smooth(*shape: int, axes: int, seed: int = 0) -> Tensor:
    """Noise whose neighbours along the last `axes` axes are alike."""
    x = torch.randn(*shape, generator=seeded(seed))
    for axis in range(-axes, 0):
        for _ in range(4):
            x = x + x.roll(1, axis) + x.roll(-1, axis)
    return (x - x.mean()) / x.std()
