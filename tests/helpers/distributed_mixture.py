"""A script for two processes that merge mixtures of experts, of which one process uses only some."""

import sys

import torch
from safetensors.torch import save_file

import fxmerge
from tests.helpers.mixtures import divided_work, model_of

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
for experts in (1.0, 0.5):
    module = fxmerge.merge(model_of("Mixtral"), **divided_work(), experts=experts).module
    save_file(module.state_dict(), f"{sys.argv[1]}/{experts}_{torch.distributed.get_rank()}.safetensors")
torch.distributed.destroy_process_group()
