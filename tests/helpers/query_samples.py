"""Samples of ops that return plain values of an activation, which are then used: sizes, numbers of axes, dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmerge.graph.ops import Aten
from tests.helpers.sandwich import SIDE, Op, Sample, call

QUERIES: dict[Any, Op] = {
    getattr: lambda m, x: x.reshape(x.shape[0], x.shape[1], SIDE, SIDE),
    "size": lambda m, x: x.view(x.size(0), x.size(1), *x.size()[2:]) if isinstance(x, Tensor) else x.view(x.size()),
    "dim": lambda m, x: x.flatten(1, x.dim() - 2).reshape(2, -1, SIDE, SIDE),
    "ndimension": lambda m, x: x.flatten(1, x.ndimension() - 2).reshape(2, -1, SIDE, SIDE),
    "numel": lambda m, x: x.reshape(2, x.numel() // 32, SIDE, SIDE),
    torch.numel: lambda m, x: x.reshape(2, call(torch.numel)(x) // 32, SIDE, SIDE),
    len: lambda m, x: x.reshape(call(len)(x), -1, SIDE, SIDE),
    "stride": lambda m, x: x.reshape(2, x.stride(0) // 16, SIDE, SIDE),
    "get_device": lambda m, x: x.sum(x.get_device()),
    "is_floating_point": lambda m, x: x * x.is_floating_point(),
    "element_size": lambda m, x: x * x.element_size(),
    torch._assert: lambda m, x: (call(torch._assert)(x.shape[1] > 0, "no channels"), x)[1],
    Aten("sym_size"): lambda m, x: x.reshape(2, call(torch.ops.aten.sym_size.int)(x, 1), SIDE, SIDE),
    torch.is_tensor: lambda m, x: x * call(torch.is_tensor)(x),
}


def query(key: Any) -> Sample:
    """A plain value of an activation, then used. The stride of a label tensor differs from the activation's."""
    if key == "get_device":  # -1 on a CPU: the last axis
        return Sample(QUERIES[key], consumer_dims=1)
    return Sample(QUERIES[key], merged=key != "stride", reason="reshape")
