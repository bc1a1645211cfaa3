"""Train a merged model for one epoch with 2-bit weights in the loop: quantisation-aware training by torchao.

The network and the 2,000 images are those of `fxmerge demo`. Half of the images are trained on, without their labels,
towards the outputs of the original; accuracy is measured on the other half. Weights of 4 bits would lose nothing here,
also without training.
"""

import copy

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import QATConfig

import fxmerge
from fxmerge.cli.demo import example

torch.manual_seed(0)
model, images, labels = example()
own, unseen, labels = images[:1000], images[1000:], labels[1000:]
TWO_BITS = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int2, weight_granularity=PerGroup(16))


def accuracy(module: nn.Module) -> float:
    with torch.no_grad():
        return 100 * float((module(unseen).argmax(1) == labels).float().mean())


result = fxmerge.merge(model, own[:2], calibration=list(own.split(100)), ratio=0.6, round_to=16)
merged = result.model
assert merged is not None
print(f"original: {accuracy(model):.1f} %, merged: {accuracy(merged):.1f} %")

rounded = copy.deepcopy(merged)
quantize_(rounded, TWO_BITS)
print(f"2 bits, rounded: {accuracy(rounded):.1f} %")

quantize_(merged, QATConfig(TWO_BITS, step="prepare"))  # layers round their weights as they compute
optimiser = torch.optim.Adam(merged.parameters(), 1e-3)
for batch in own[torch.randperm(len(own))].split(10):
    with torch.no_grad():
        aim = model(batch).softmax(1)
    optimiser.zero_grad()
    nn.functional.cross_entropy(merged(batch), aim).backward()
    optimiser.step()
quantize_(merged, QATConfig(TWO_BITS, step="convert"))
print(f"2 bits, after one epoch: {accuracy(merged):.1f} %")
