"""Unparametrizing: a weight that is computed at each use, by torch.nn.utils, becomes a plain parameter.

That is what `parametrize` does, and the older hooks of `weight_norm` and `spectral_norm`.

A layer whose weight is a parameter can be merged where one whose weight is computed cannot. The value is the one that
the layer has in evaluation mode; what it was computed from (a direction and a length, say) is gone from the copy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from fxmerge.weights.disk_tensor import beside


def unparametrize(model: nn.Module) -> None:
    """Give each parametrized module of a model, in place, plain tensors and the class that it had before.

    torch's own `remove_parametrizations` also edits the class, which copies of a module share with the original.
    """
    for module in list(model.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if not parametrize.is_parametrized(module):
            continue
        plain = {}
        for name, how in module.parametrizations.items():  # type: ignore[union-attr, operator]
            with torch.no_grad():
                value = getattr(module, name).detach().clone()
            for source in how.parameters():
                value = beside(source, value)
            trained = [p.requires_grad for p in how.parameters()]
            plain[name] = nn.Parameter(value, requires_grad=any(trained)) if trained else value
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for name, value in plain.items():
            if isinstance(value, nn.Parameter):
                module.register_parameter(name, value)
            else:
                module.register_buffer(name, value)


def computed(model: nn.Module) -> list[Tensor]:
    """The weights that hooks have left on a model as plain attributes; torch does not copy what has a history."""
    held = (value for module in model.modules() for value in module.__dict__.values())
    return [value for value in held if isinstance(value, Tensor) and value.grad_fn is not None]
