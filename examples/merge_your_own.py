"""Halve the channels of a SqueezeNet: three lines, and a report of what was done."""

import torch
import torchvision

import fxmerge

model = torchvision.models.squeezenet1_1(weights=None).eval()  # put your own trained model here
x = torch.randn(1, 3, 64, 64)  # and an input that it takes; only its shape matters

result = fxmerge.merge(model, x, ratio=0.5)

print(result.report.text())
print("the merged model gives", tuple(result.module(x).shape))
