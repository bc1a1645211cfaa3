"""Re-solves the layers of a merged model in closed form, so that they reproduce the original's outputs.

refit_layers   both models, run side by side; each affected layer is re-solved in execution order
sites          the rows and the targets that a layer is solved on
shared         weights that serve several calls
targets        the outputs that a layer is solved for
solve          the weights of one layer, from a sample of its output positions
regions        layers that can be fitted together: those that write and those that read the same channels
joint_steps    which regions are fitted in a run, and what is kept until then
joint          the layers of one region, optimised together
coordinates    in which their weights move
contradiction  where the reported errors do not agree with the measured one
handed_out     which of the refitted, the merged and the pruned model is closest to the original
layer_weights  the weights of a graph's layers, read and replaced
records        what refit did to each layer
"""
