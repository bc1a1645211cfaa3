"""Runs the original and the merged graph on calibration data or probes, for planning and refit.

batches       calibration data from the user with variants of them, or probes, as batches
trial_runs    whether the model runs on other values, batch sizes and memory formats
user_data     calibration data as values of the graph's placeholders
fit_probes    probes, optimised to match the running statistics of BatchNorms
patches       linear layers and convolutions as one matrix product of patches
padding       which positions of the batches a mask switches off
held_out      which samples are held out of refit's solves, to judge them
output_error  how far a merged graph's outputs are from the original's
paired_run    the original and the merged graph, run side by side node by node
epilogue      the norm, add and activation that follow a layer
rectifiers    activations that clamp their input to bounds
readings      the second moments of the consumers' patches, for selections that use them
score_readings  what attention scores lose without some channels of queries and keys
sensitivity   how much the outputs of the model change with an error at one layer
salience      how much they depend on each output position of a layer
slopes        the gradients from which both are computed
"""
