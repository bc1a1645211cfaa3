"""Re-solves the layers of a merged model in closed form, so that they reproduce the original's outputs.

refit_layers   both models, run side by side; each affected layer is re-solved in execution order
sites          the rows and the targets that a layer is solved on
shared         weights that serve several calls
targets        the outputs that a layer is solved for
solve          the weights of one layer, from a sample of its output positions
chains         pairs of a layer and its only consumer
joint          such a pair, optimised together
contradiction  where the reported errors do not agree with the measured one
handed_out     which of the refitted, the merged and the pruned model is closest to the original
layer_weights  the weights of a graph's layers, read and replaced
records        what refit did to each layer
"""
