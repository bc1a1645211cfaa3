"""A script for two processes that give fxmerge a model sharded by FSDP2 (tests/capture/test_sharded.py).

Each writes the error, and whether what it advises gives the merge of the whole model.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxmerge


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
mesh = init_device_mesh("cpu", (2,))
sharded, x = make(), torch.randn(3, 6)
fully_shard(sharded, mesh=mesh)
try:
    fxmerge.merge(sharded, x, refit="none")
    said = "merged"
except fxmerge.FxMergeError as error:
    said = str(error)
state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
whole = fxmerge.merge(make(), x, refit="none").module.state_dict()
same = True
if rank == 0:  # the whole state_dict is on the first process
    model = make()
    for value in model.parameters():
        value.data.zero_()
    model.load_state_dict(state)
    found = fxmerge.merge(model, x, refit="none").module
    same = all(torch.equal(value, whole[name]) for name, value in found.state_dict().items())
module = fxmerge.merge(make(), x, refit="none").module
expected = module(x).detach()
fully_shard(module, mesh=mesh)
same = same and torch.allclose(module(x), expected, atol=1e-6)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps([said, same]), encoding="utf-8")
torch.distributed.destroy_process_group()
