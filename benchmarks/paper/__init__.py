"""The tables of Neuron Merging (Kim et al., NeurIPS 2020)."""
