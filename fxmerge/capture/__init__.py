"""Captures a model as a torch.fx graph, given example inputs.

capture_model     `capture`: the graph, checked against the model on the example inputs
output_cache      outputs of layers from the model's run, reused in the run of the graph
parametrizations  weights computed by torch.nn.utils, replaced by plain parameters
symbolic          symbolic tracing, and the choice between it and torch.export
without_rule      the number of calls without a rule, by which one capture is preferred to another
hooks             hooks of leaf modules, traced with the call that they belong to
frozen            the comparison with the model on other inputs, where tracing may have frozen a value
expand_modules    torch's transformer layers, expanded into ops that have rules
torch_export      graphs of torch.export
free_sizes        exports in which sizes are free as far as the model lets them vary
guards            the sizes of inputs for which such a graph holds, as assertions in it
quantized         quantized models, which are declined
record            a graph recorded from one run, for models that cannot be traced
constant_fold     values computed from parameters alone, folded into parameters
biased_products   products that add a bias in one call, written as a product and a sum
frames            one frame of a recorded run
training          models whose graph is another one in training mode
"""
