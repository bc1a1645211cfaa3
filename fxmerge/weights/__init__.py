"""Parameters and buffers: read, replaced, shared between copies, kept on disk, and written to files.

by_path        a module's parameters and buffers by path, to be read or replaced
copy           copies of a module that share its tensors until they are written
layout         the input columns of a layer's weight, and the sizes that a module keeps of it
meta           models on the meta device, which have shapes but no values
stored_tensor  tensors whose values are elsewhere until an op needs them
file_regions   their places in safetensors files
shards         their places where weights are divided among processes (FSDP2)
on_disk        models made of such tensors
files          files and folders that are written atomically
closures       functions that hold objects of a model in their closures or defaults, made to hold those of a copy
memory_format  memory formats of weights: a weight in channels_last stays so when it is replaced by a smaller one
unreadable     the error for a file of weights that cannot be read
"""
