"""The source code of a merged model: a graph as plain torch.nn code.

layers        a graph with layers instead of functions of bare parameters
names         literals, line breaks and the names of local variables
containers    how a module's children and tensors are held and reached
expressions   the nodes of a graph as the lines of a forward
constructors  the call that creates a layer
init          the lines of __init__
module        the Python file of a model
"""
