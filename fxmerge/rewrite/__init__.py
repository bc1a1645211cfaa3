"""Builds the merged model from a plan. Only this folder and refit change weights.

slicing     a parameter, rebuilt from some of its entries
rewriter    a copy of the graph module whose kept channels absorb the dropped ones, then sliced
rotate      the same model with other channels, where any matrix may mix them
reassemble  the model that users get: the graph module, or their own class
"""
