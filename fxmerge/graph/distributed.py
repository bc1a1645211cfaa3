"""torch.distributed: the rank of this process, and sums over all processes."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """The rank of this process and the world size; (0, 1) where torch.distributed is not initialized."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself where there is only one."""
    if rank_and_size()[1] > 1:
        value = value.clone().contiguous()
        torch.distributed.all_reduce(value)
    return value
