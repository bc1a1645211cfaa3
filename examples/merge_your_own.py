"""Halve the number of channels of a SqueezeNet, and print the report."""

import torch
import torchvision

import fxmerge

model = torchvision.models.squeezenet1_1(weights=None).eval()  # put your own trained model here
x = torch.randn(1, 3, 64, 64)  # and an example input; only its shape matters

result = fxmerge.merge(model, x, ratio=0.5)

print(result.report.text())
print("output of the merged model:", tuple(result.module(x).shape))
