"""The source code of a merged model: a graph as plain torch.nn code.

layers       a graph with layers instead of functions of bare parameters
names        literals, paths and the names of local variables
expressions  the nodes of a graph as the lines of a forward
module       the Python file of a model
"""
