"""torch.distributed: the rank of this process, sums over all processes, and models that are divided among them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxmerge.errors import FxMergeError

_SHARDED = ("torch.distributed.tensor", "torch.distributed._tensor")


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


def check_whole(model: nn.Module) -> None:
    """Raises FxMergeError where each process holds a part of the weights, as under FSDP2 or tensor parallelism."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if type(value).__module__.startswith(_SHARDED):
            raise FxMergeError(
                f"{name} is divided among processes (a {type(value).__name__}); merge the whole model, and divide "
                "result.module afterwards. Where it does not fit into memory, save its full state_dict "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) to "
                "safetensors, and merge fxmerge.on_disk(make, files), which reads one layer at a time"
            )
