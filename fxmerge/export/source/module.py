"""A merged model as a readable Python file: plain torch.nn code with the user's names and with sizes as literals.

The functions below raise FxMergeError for what such a file cannot contain: a class or function from outside torch,
torchvision and timm, or a layer that does not hold its constructor's arguments as attributes.
"""

from __future__ import annotations

import re
from textwrap import wrap

from torch import fx

from fxmerge.export.source.containers import children, in_order
from fxmerge.export.source.expressions import Body
from fxmerge.export.source.init import Init
from fxmerge.export.source.names import broken
from fxmerge.graph.eval_mode import EvaluationModule

_HEAD = '''"""{name}, merged by fxmerge: {count:,} parameters.

`load()` gives the model with the weights of weights.safetensors, which stands beside this file.
"""

import json
{standard}from pathlib import Path

import torch
{others}

class MergedModel({base}):
    def __init__(self):
        super().__init__()
'''

_TRAIN = """
    def train(self, mode=True):
        if mode:
            raise RuntimeError(
                {message}
            )
        return super().train(mode)
"""

_LOAD = '''

def load(weights=Path(__file__).with_name("weights.safetensors")):
    """The model in evaluation mode, with its weights."""
    model = MergedModel().eval()
    data = bytearray(Path(weights).read_bytes())  # safetensors: the header's length, the header, the tensors
    start = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:start]), torch.frombuffer(data, dtype=torch.uint8)[start:]
    for name, tensor in model.state_dict().items():
        begin, end = header[name]["data_offsets"]
        tensor.copy_(tensors[begin:end].view(tensor.dtype).view(header[name]["shape"]))
    return model
'''


def source(module: fx.GraphModule, name: str, plain: bool = True) -> str:
    """The text of a model.py with `class MergedModel` and `load()`, for a graph returned by `layers.layered`.

    name:  the class of the original model, for the docstring
    plain: see `expressions.Body`
    """
    body = Body(module, plain)
    init = [line for text in Init(module, body.imports).lines for line in broken(text, 8)]
    forward = [line for text in body.lines for line in broken(text, 8)]
    signature = broken(f"def forward({', '.join(['self', *body.signature])})", 4)
    signature[-1] += ":"
    code = "\n".join([*init, "", *signature, *forward])
    if isinstance(module, EvaluationModule):
        lines = [f'"{line} "' for line in wrap(module.no_training, 90)]
        code += "\n" + _TRAIN.format(message="\n                ".join(lines)).rstrip()
    functional = ["import torch.nn.functional as F"] if re.search(r"\bF\.", code) else []
    others = [*functional, "from torch import nn"]
    count = sum(p.numel() for p in module.parameters())
    standard = sorted(i for i in body.imports if i.startswith("import "))
    foreign = sorted(i for i in body.imports if not i.startswith("import "))
    head = _HEAD.format(
        name=name,
        base="nn.Sequential" if in_order(children(module)) else "nn.Module",
        count=count,
        standard="".join(f"{line}\n" for line in standard),
        others="\n".join(sorted([*others, *foreign], key=_order)) + "\n",
    )
    return head + code + "\n" + _LOAD


def _order(line: str) -> tuple[bool, str]:
    return (not line.startswith("import"), line.split()[1])
