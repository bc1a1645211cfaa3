"""Recall: what a layer gave the model is not computed again for the graph that was traced from it.

What a plain convolution or linear layer gives depends on its input and its parameters alone. Where the graph calls the
very module that the model called, with the very bits, the interpreter takes what the model got. The first calls are
held, until their inputs and outputs together are as large as the model's parameters in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.weights.disk_tensor import DiskTensor

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # these very classes: one derived from them may do anything


class Recall:
    """The last call of each layer while `watching` a model."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, tuple[int, Tensor, Tensor]] = {}  # layer -> its parameters' version, input, output
        self.room = 0  # elements that may yet be held

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        watched = [
            m
            for m in model.modules()
            if type(m) in _PLAIN and not (m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)
        ]
        self.room = sum(p.numel() for p in model.parameters() if not isinstance(p, DiskTensor))
        handles = [m.register_forward_hook(self._note) for m in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        size = sum(a.numel() for a in args) + output.numel()
        if len(args) == 1 and args[0].dtype == output.dtype and size <= self.room:  # under autocast dtypes differ
            self.room -= size
            self.calls[layer] = _version(layer), args[0].clone(), output.clone()  # either may yet be overwritten

    def output(self, layer: Any, args: tuple[Any, ...]) -> Tensor | None:
        """What the layer gave for this input, once; None where it was not called so."""
        version, x, out = self.calls.get(layer, (0, None, None))
        if x is None or len(args) != 1 or _version(layer) != version or not _same(x, args[0]):
            return None
        del self.calls[layer]
        return out


def _version(layer: nn.Module) -> int:
    """A number that grows whenever a parameter is written."""
    return sum(p._version for p in layer._parameters.values() if p is not None)  # those of `_PLAIN` are its own


def _same(one: Tensor, other: Any) -> bool:
    alike = isinstance(other, Tensor) and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)
