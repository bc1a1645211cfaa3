"""Training of merged models towards their originals.

distillation   the loss: soft outputs, and the activations behind merged groups
distill        a loop over it
checkpoint     what a loop needs to go on after an interruption, in one safetensors file
"""
