"""The command line.

main      the commands and their flags
specs     how a model is named: `torchvision:resnet18`, `path/to/file.py:factory`
terminal  output where the encoding has no box-drawing characters
demo      `fxmerge demo`, on a small network and images that are part of the package
"""
