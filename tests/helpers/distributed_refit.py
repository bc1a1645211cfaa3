"""A script for two processes that refit together and save their weights (tests/refit/test_refit_layers.py)."""

import sys

import torch
from safetensors.torch import save_file

import fxmerge
from tests.helpers.nets import NETS

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
model, x = NETS["residual"]()
data = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(7))
for name, given in (("synthetic", None), ("calibration", list(data.split(16)))):
    options = fxmerge.Options(refit="synthetic", selection="repair", samples=64, batch=16, rows=10**6)
    module = fxmerge.merge(model, x, options, calibration=given).module
    save_file(module.state_dict(), f"{sys.argv[1]}/{name}{torch.distributed.get_rank()}.safetensors")
torch.distributed.destroy_process_group()
