"""A script for two processes that train a merged model with DDP and FSDP2 (tests/training/test_training_mode.py)."""

import sys

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.netmaking import plain_merge
from tests.helpers.nets import NETS

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
data = torch.randn(8, 12, generator=torch.Generator().manual_seed(7))[4 * rank : 4 * rank + 4]
mesh = init_device_mesh("cpu", (2,))
able = hasattr(torch.cpu.Stream, "record_event")  # FSDP2 of torch 2.6 does not run on CPUs
for name in ("ddp", "fsdp") if able else ("ddp",):
    module = plain_merge(*NETS["mlp"]()).module.train()
    if name == "ddp":
        wrapped = DistributedDataParallel(module)
    else:
        for layer in module.children():
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(module, mesh=mesh)
    optimiser = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        wrapped(data).square().mean().backward()
        optimiser.step()
    state = {k: v.full_tensor() if name == "fsdp" else v for k, v in module.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, f"{sys.argv[1]}/{name}{rank}.safetensors")
torch.distributed.destroy_process_group()
