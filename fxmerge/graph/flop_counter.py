"""torch's FLOP counter, extended by the kernels of recurrent layers and of experts that it would count as 0."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """A mode that counts the FLOPs of what runs in it: a multiply-add counts as two, elementwise ops as 0.

    A recurrent layer costs 2 FLOPs for each sample, step and element of its weights, whichever kernel runs it. This is
    what torch counts where a layer runs as separate matrix products.
    """
    from torch.utils.flop_counter import FlopCounterMode

    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # None unless transformers is in use
    grouped = {fallback: _grouped} if fallback is not None else {}
    return FlopCounterMode(display=False, custom_mapping=_FUSED | grouped)


@contextmanager
def without_dynamo() -> Iterator[None]:
    """Keeps a counter from importing torch._dynamo, which takes seconds.

    At the first op, torch wraps the counter's method so that torch.compile skips it, and keeps the wrapper as an
    attribute of the method. While torch._dynamo is not imported, nothing is compiled, and the method itself will do.
    """
    from torch.utils import flop_counter

    mode = getattr(flop_counter, "_FlopCounterMode", None)
    method = getattr(getattr(mode, "__torch_dispatch__", None), "__wrapped__", None)  # None before torch wrapped it
    if method is None or "torch._dynamo" in sys.modules or hasattr(method, "__dynamo_disable"):
        yield
        return
    method.__dynamo_disable = method
    try:
        yield
    finally:
        del method.__dynamo_disable


def _mkldnn(x: Shape, ih: Shape, hh: Shape, *rest: Any, **kwargs: Any) -> int:
    """One layer in one direction, of an input (steps, batch, channels)."""
    return 2 * prod(x[:-1]) * (prod(ih) + prod(hh))


def _cudnn(x: Shape, weights: Sequence[Shape], *rest: Any, **kwargs: Any) -> int:
    """All layers and directions; biases are the weights of one axis."""
    return 2 * prod(x[:-1]) * sum(prod(w) for w in weights if len(w) == 2)


def _grouped(x: Shape, weight: Shape, *rest: Any, **kwargs: Any) -> int:
    """Rows (rows, in) times the matrix of their expert. weight: (experts, in, out)"""
    return 2 * prod(x) * weight[-1]


_FUSED: dict[Any, Any] = {torch.ops.aten.mkldnn_rnn_layer: _mkldnn, torch.ops.aten._cudnn_rnn: _cudnn}
