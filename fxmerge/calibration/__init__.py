"""Runs the original and the merged graph on calibration data or probes, for planning and refit.

batches       calibration data from the user, or probes, as batches
fit_probes    probes, optimised to match the running statistics of BatchNorms
patches       linear layers and convolutions as one matrix product of patches
paired_run    the original and the merged graph, run side by side node by node
epilogue      the norm, add and activation that follow a layer
readings      the second moments of the consumers' patches, for selections that use them
sensitivity   how much the outputs of the model change with an error at one layer
output_error  how far the outputs of a merged graph are from the original's
"""
