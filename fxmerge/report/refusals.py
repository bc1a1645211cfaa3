"""The number of parameters that channels which cannot be merged account for."""

from __future__ import annotations

import re

from torch import nn

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Refusal


def _submodule(module: nn.Module | None, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path) if module is not None else None
    except AttributeError:
        return None


def parameters_held(refusal: Refusal, captured: Capture) -> int:
    """The number of parameters, bias included, in the producer's rows for the refused channels."""
    path = re.sub(r"#(\d+|whole)(?=#|$)", "", refusal.name)  # a group's name is that of its producer and a number
    owner, _, name = path.rpartition(".")
    layer, own = None, []
    for module in (captured.module, captured.model):  # layers that did not run are in the user's model only
        layer = _submodule(module, path)
        own = [p for _, p in layer.named_parameters(recurse=False)] if layer is not None else []
        if layer is None:  # the name is that of a parameter, which the graph passes to a function
            layer = _submodule(module, owner)
            named = layer.named_parameters(recurse=False) if layer is not None else ()
            own = [p for n, p in named if n == name or n.rpartition(".")[0] == name]
        if own:
            break
    sizes = [getattr(layer, name, None) for name in ("out_features", "out_channels", "embedding_dim")]
    first = own[0].size(0) if own and own[0].dim() else len(own)  # a 0-dimensional parameter is one channel
    produced = next((size for size in sizes if isinstance(size, int)), first)
    return round(sum(p.numel() for p in own) * refusal.channels / produced) if produced else 0
