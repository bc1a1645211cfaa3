"""Refused: how much a channel that stays keeps back."""

from __future__ import annotations

from torch import nn

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Refusal


def _submodule(module: nn.Module | None, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path) if module is not None else None
    except AttributeError:
        return None


def parameters_held(refusal: Refusal, captured: Capture) -> int:
    """How many parameters of the layer that writes them the refused channels hold back: their rows, with the bias."""
    owner, _, name = refusal.name.rpartition(".")
    layer, own = None, []
    for module in (captured.module, captured.model):  # what did not run is in the user's model only
        layer = _submodule(module, refusal.name)
        own = [p for _, p in layer.named_parameters(recurse=False)] if layer is not None else []
        if layer is None:  # a parameter that a function is called with
            layer = _submodule(module, owner)
            named = layer.named_parameters(recurse=False) if layer is not None else ()
            own = [p for n, p in named if n == name or n.rpartition(".")[0] == name]
        if own:
            break
    sizes = [getattr(layer, name, None) for name in ("out_features", "out_channels", "embedding_dim")]
    first = own[0].size(0) if own and own[0].dim() else len(own)  # a number alone is one channel
    written = next((size for size in sizes if isinstance(size, int)), first)
    return round(sum(p.numel() for p in own) * refusal.channels / written) if written else 0
