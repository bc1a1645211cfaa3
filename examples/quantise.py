"""Quantise a merged model with torchao: its layers are ordinary nn.Linear modules."""

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fxmerge

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
x = torch.randn(8, 64)

merged = fxmerge.merge(model, x, ratio=0.5).module
with torch.no_grad():
    before = merged(x)
    quantize_(merged, Int8WeightOnlyConfig())  # in place
    error = float((merged(x) - before).norm() / before.norm())

old, new = model.get_parameter("2.weight"), merged.get_parameter("2.weight")
print(f"layer 2: {tuple(old.shape)} {old.dtype} -> {tuple(new.shape)} {type(new).__name__}")
print(f"relative change of the output by quantising: {error:.4f}")
