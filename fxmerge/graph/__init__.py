"""Functions of a torch.fx graph, of a model, or of a single call that any stage may use.

nested        the leaves of nested arguments and outputs
ops           calls of ops: as graph nodes, as a torch function mode sees them, as aten overloads
inputs        the values of a graph's placeholders
outputs       the tensors that a model returns, and the objects that a graph cannot return
eval_mode     modules in evaluation mode, with reproducible random numbers
compare       the difference between the outputs of two models
cost          parameters and FLOPs, for a model and for each module
latency       the time of one model relative to another
distributed   rank, world size, and sums over the processes of torch.distributed
flop_counter  torch's FLOP counter, extended by the fused kernels of recurrent layers, which it would count as 0
odd_names     graphs whose modules or parameters have names that are not Python names
"""
