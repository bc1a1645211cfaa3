"""The source code of a merged model: a graph as plain torch.nn code."""
