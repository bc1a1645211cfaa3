"""The modelling file of a merged model of Hugging Face whose widths no configuration gives."""

CODE = '''"""{name} with the widths of a merged model. It needs transformers only.

`{auto}.from_pretrained(folder, trust_remote_code=True)` finds this file by `auto_map` in config.json. The entry
`fxmerge` there has what differs from {name}: the shapes of tensors, and the numbers that layers keep of their widths.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import {name}


class Merged{name}({name}):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for module in [m for m in self.modules() if parametrize.is_parametrized(m)]:
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
        modules = dict(self.named_modules(remove_duplicate=False))
        like = next(self.parameters())
        for name, shape in config.fxmerge["parameters"].items():
            path, _, last = name.rpartition(".")
            empty = torch.empty(shape, dtype=like.dtype, device=like.device)
            modules[path].register_parameter(last, nn.Parameter(empty))
        for name, shape in config.fxmerge["buffers"].items():
            path, _, last = name.rpartition(".")
            like = modules[path].get_buffer(last)
            modules[path].register_buffer(last, torch.empty(shape, dtype=like.dtype, device=like.device))
        for name, value in config.fxmerge["attributes"].items():
            path, _, last = name.rpartition(".")
            setattr(modules[path], last, tuple(value) if isinstance(value, list) else value)
        self.tie_weights()
'''
