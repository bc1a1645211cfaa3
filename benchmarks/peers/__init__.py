"""fxmerge compared with Torch-Pruning and with the published Neuron Merging."""
