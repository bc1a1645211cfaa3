"""The command line.

main      the commands and their flags
specs     how a model is named: `torchvision:resnet18`, `path/to/file.py:factory`
published the weights and the preprocessing that torchvision and timm publish
data      example inputs and calibration data: arrays, images, token ids
terminal  output where the encoding has no box-drawing characters
demo      `fxmerge demo`, on a small network and images that are part of the package
"""
