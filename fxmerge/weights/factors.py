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
            found *= slot_of(member, "weight", tensor_at, n)
        if member.layer.has_running_statistics:
            found /= (slot_of(member, "running_var", tensor_at, n) + member.layer.eps).sqrt()
    return found


def slot_of(member: Member, slot: str, tensor_at: Callable[[str], Tensor], n: int) -> Tensor:
    """One tensor of a factor by channel, (n,) float64; zeros where it has none."""
    found = torch.zeros(n, dtype=torch.float64)
    if slot in member.layer.params:
        value = tensor_at(member.layer.params[slot]).detach().double().cpu().flatten()
        found[member.channels] = value[member.where[:, 0]]
    return found


def constant_of(members: Sequence[Member], tensor_at: Callable[[str], Tensor], n: int) -> Tensor:
    """What is left of zero after these factors, in turn, (n,) float64."""
    found = torch.zeros(n, dtype=torch.float64)
    for member in members:
        found = found * gain_of([member], tensor_at, n) + slot_of(member, "bias", tensor_at, n)
    return found
