"""Inputs that a capture has not seen: other values, other batch sizes, other lengths and image sizes.

Nothing is known about what a model accepts, so these are proposals: a model that needs images of one size does not run
on some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxmerge.graph.nested import leaves, tree


@dataclass(frozen=True)
class Unseen:
    """The arguments of a call, and how they differ from the example inputs: "values", "batch 3", "axes 2, 3: 4".

    batch: (the example's number of samples, the number here), where they differ
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: tuple[int, int] | None = None


def unseen(args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int = 0) -> tuple[Unseen, ...]:
    """Inputs that differ from the example's: the first has the example's shapes, each other one has another size.

    A size is changed in all tensors that have it at the same place. Floating-point values are drawn from a normal
    distribution with the mean and deviation of the example's, within its range. Integers, and floating-point numbers
    that are all whole (such as masks), are the example's in another order.
    """
    generator = torch.Generator().manual_seed(seed)

    def proposal(name: str, resized: Callable[[Tensor], Tensor], batch: tuple[int, int] | None = None) -> Unseen:
        def one(leaf: Any) -> Any:
            return _redrawn(resized(leaf), generator) if isinstance(leaf, Tensor) else leaf

        return Unseen(name, tree(one, tuple(args)), tree(one, dict(kwargs)), batch)

    found = [proposal("values", lambda t: t)]
    tensors = [leaf for leaf in leaves([args, kwargs]) if isinstance(leaf, Tensor) and leaf.dim()]
    main = next((t for t in tensors if t.dim() > 1), tensors[0] if tensors else None)
    if main is None:
        return tuple(found)
    for axes, size in _sizes(main):
        place = f"batch {size}" if axes == (0,) else f"{'axis' if len(axes) == 1 else 'axes'} {_listed(axes)}: {size}"
        of_axes = {axis: main.size(axis) for axis in axes}
        resized = partial(_resized, sizes=of_axes, size=size)
        found.append(proposal(place, resized, (main.size(0), size) if axes == (0,) else None))
    return tuple(found)


def _listed(axes: tuple[int, ...]) -> str:
    return ", ".join(map(str, axes))


def _sizes(main: Tensor) -> list[tuple[tuple[int, ...], int]]:
    """(axes, the size that they get) for each proposal: the batch, the sides of an image, and each other axis."""
    batch = main.size(0)
    proposals: list[tuple[tuple[int, ...], int]] = [((0,), batch + 1), *([((0,), 1)] if batch > 1 else [])]
    sides = tuple(range(main.dim() - 2, main.dim())) if main.dim() > 3 else ()
    if sides and main.size(-1) == main.size(-2):
        side = main.size(-1)
        proposals += [(sides, size) for size in (side // 2, side + side // 2) if size > 1]
    for axis in range(1, main.dim()):
        size = main.size(axis)
        if axis not in sides and size > 1:
            proposals += [((axis,), size - 1), ((axis,), size + 1)]
    return proposals


def _resized(tensor: Tensor, sizes: Mapping[int, int], size: int) -> Tensor:
    """The tensor with this size along the axes where it has the sizes given; entries are repeated where it grows."""
    for axis, before in sizes.items():
        if axis < tensor.dim() and tensor.size(axis) == before:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % before)
    return tensor


def _redrawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Other values of the same kind."""
    if tensor.numel() < 2:
        return tensor * 1.25 if tensor.is_floating_point() else tensor
    drawable = (
        tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) and bool((tensor != tensor.round()).any())
    )
    if not drawable:
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.flatten()[order].view(tensor.shape)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return (tensor.mean() + tensor.std() * drawn).clamp(tensor.min(), tensor.max())
