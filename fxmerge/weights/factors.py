"""The gains of a group's channel factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxmerge.ir.groups import Member


def gain_of(members: Sequence[Member], tensor_at: Callable[[str], Tensor], n: int) -> Tensor:
    """The product of what these parameters multiply each of a group's n channels by, (n,) float64."""
    found = torch.ones(n, dtype=torch.float64)
    for member in members:
        if "weight" in member.layer.params:
            weight = tensor_at(member.layer.params["weight"]).detach().double().cpu().flatten()
            found[member.channels] *= weight[member.where[:, 0]]
    return found


def constant_of(members: Sequence[Member], tensor_at: Callable[[str], Tensor], n: int) -> Tensor:
    """What is left of zero after these factors, in turn, (n,) float64."""
    found = torch.zeros(n, dtype=torch.float64)
    for member in members:
        found *= gain_of([member], tensor_at, n)
        if "bias" in member.layer.params:
            bias = tensor_at(member.layer.params["bias"]).detach().double().cpu().flatten()
            found[member.channels] += bias[member.where[:, 0]]
    return found
