"""The arguments of a call: mapped to the placeholders of a graph, and made anew with other values or sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxmerge.graph.nested import leaves, tree


def bind(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of the placeholders, in order; those of an exported graph are the leaves of the arguments."""
    if is_exported(module):
        return list(tree_leaves((args, dict(kwargs))))
    values, positional = [], list(args)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            values.append(positional.pop(0) if positional else kwargs.get(str(node.target), default))
    return values


def is_exported(module: fx.GraphModule) -> bool:
    """Whether torch.export made the graph. Such a graph takes flattened arguments."""
    return pytree_codegen(module) is not None


def pytree_codegen(module: fx.GraphModule) -> fx.graph._PyTreeCodeGen | None:
    """The record of how an exported graph flattens its arguments and outputs; None for any other graph."""
    codegen = module.graph._codegen
    return codegen if isinstance(codegen, fx.graph._PyTreeCodeGen) else None


def other_values(value: Any) -> Any:
    """The same nested arguments with other values in their tensors; shapes, dtypes and ranges of values stay.

    Booleans and integers (token ids, masks) are the same ones in another order, so that none is out of range.
    """
    generator = torch.Generator().manual_seed(7)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_meta or not leaf.numel():
            return leaf
        shuffled = leaf.flatten()[torch.randperm(leaf.numel(), generator=generator).to(leaf.device)].view(leaf.shape)
        if not leaf.is_floating_point():
            return shuffled
        drawn = torch.rand(leaf.shape, generator=generator).to(leaf)
        return shuffled * (0.5 + 0.5 * drawn) if bool(leaf.any()) else drawn  # equal values change as well

    return tree(other, value)


def other_sizes(value: Any) -> Iterator[Any]:
    """The same nested arguments in other sizes: another number of samples, then other lengths and image sizes.

    An axis counts as one that can change if all tensors that have it agree on its size. Which sizes a model takes, only
    the model can tell.
    """
    given = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
    for axes in ((0,), (1,), (2, 3), (-1,)):

        def resized(leaf: Any, axes: tuple[int, ...] = axes) -> Any:
            if isinstance(leaf, Tensor):
                for axis in axes:
                    if -leaf.dim() <= axis < leaf.dim():
                        leaf = _resized(leaf, axis)
            return leaf

        sizes = {leaf.shape[axis] for leaf in given for axis in axes[:1] if -leaf.dim() <= axis < leaf.dim()}
        if len(sizes) == 1:
            yield tree(resized, value)


def _resized(value: Tensor, axis: int) -> Tensor:
    """Half of the entries along an axis (the first of a batch), or two where there is one."""
    size = value.shape[axis]
    if size == 1:
        return torch.cat([value, value], axis)
    return value.narrow(axis, 0, 1 if axis == 0 else (size + 1) // 2)
