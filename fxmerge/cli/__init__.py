"""The command line.

main   the commands and their flags
specs  how a model is named: `torchvision:resnet18`, `path/to/file.py:factory`
demo   `fxmerge demo`, on a small network and images that are part of the package
"""
