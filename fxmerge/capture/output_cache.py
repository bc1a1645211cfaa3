"""Caches the outputs of layers while the model runs, so that the run of the traced graph need not compute them again.

The output of a plain convolution or linear layer depends on its input and its parameters only. Where the graph calls
the same module as the model did, with a bitwise equal input, the interpreter takes the cached output. Calls are cached
until their inputs and outputs take as many elements as the model's parameters in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.weights.stored_tensor import StoredTensor

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # not their subclasses, whose forward may do anything


class OutputCache:
    """The input and output of the last call of each layer while `watching` a model."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, tuple[int, Tensor, Tensor]] = {}  # layer -> (version, input, output)
        self.room = 0  # elements that can still be cached

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Caches the calls of the model's plain layers in this context."""
        watched = [
            m
            for m in nn.Module.modules(model)
            if type(m) in _PLAIN and not (m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)
        ]
        self.room = sum(p.numel() for p in model.parameters() if not isinstance(p, StoredTensor))
        handles = [m.register_forward_hook(self._store) for m in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _store(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        size = sum(a.numel() for a in args) + output.numel()
        if len(args) == 1 and args[0].dtype == output.dtype and size <= self.room:  # dtypes differ under autocast
            self.room -= size
            self.calls[layer] = _version(layer), args[0].clone(), output.clone()  # cloned: they may be overwritten

    def output(self, layer: Any, args: tuple[Any, ...]) -> Tensor | None:
        """The cached output of a layer for this input, which is then removed; None where there is none."""
        version, x, out = self.calls.get(layer, (0, None, None))
        if x is None or len(args) != 1 or _version(layer) != version or not _same(x, args[0]):
            return None
        del self.calls[layer]
        return out


def _version(layer: nn.Module) -> int:
    """A number that increases whenever a parameter of the layer is written in place."""
    return sum(p._version for p in layer._parameters.values() if p is not None and not p.is_inference())


def _same(one: Tensor, other: Any) -> bool:
    alike = isinstance(other, Tensor) and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)
