"""Training of merged models towards their originals, and merging while a model is trained.

distillation      the loss: soft outputs, and the activations behind merged groups
distill           a loop over it
checkpoint        what a loop needs to go on after an interruption, in one safetensors file
shrinker          channels that fade, grow back and leave in anybody's loop
optimizer_state   optimizers that follow the channels
"""
