"""Re-solves the layers of a merged model in closed form, so that they reproduce the original's outputs.

refit_layers   both models, run side by side; each affected layer is re-solved in execution order
targets        the outputs that a layer is solved for
solve          the weights of one layer, from a sample of its output positions
chains         pairs of a layer and its only consumer
joint          such a pair, optimised together
layer_weights  the weights of a graph's layers, read and replaced
"""
