"""Replaces weights that torch.nn.utils computes at each use by plain parameters.

Such weights come from torch.nn.utils.parametrize, from the older hooks of torch.nn.utils.weight_norm and
spectral_norm, and from the masks of torch.nn.utils.prune. A layer can be merged only if its weight is a parameter. The
parameter gets the value that the weight has in evaluation mode; the tensors that it was computed from, such as a
direction and a length, are dropped from the copy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from fxmerge.weights.stored_tensor import beside


def unparametrize(model: nn.Module) -> None:
    """Gives each parametrized module of a model plain tensors and its original class, in place.

    torch.nn.utils.parametrize.remove_parametrizations is not used, since it also edits the class, which a copy of a
    module shares with the original.
    """
    for module in list(nn.Module.modules(model)):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, BasePruningMethod):
                _unmask(module, hook)
                del module._forward_pre_hooks[key]
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


def _unmask(module: nn.Module, hook: BasePruningMethod) -> None:
    """Gives a module the masked weight as a parameter, in place.

    torch.nn.utils.prune.remove is not used, since it writes the masked weight into the tensor of the original, which a
    copy of a module shares.
    """
    name = hook._tensor_name
    original = getattr(module, f"{name}_orig")
    with torch.no_grad():
        masked: Tensor = hook.apply_mask(module)  # type: ignore[no-untyped-call]
        value = beside(original, masked.detach().clone())
    delattr(module, name)  # the last masked value, a plain attribute
    delattr(module, f"{name}_orig")
    delattr(module, f"{name}_mask")
    module.register_parameter(name, nn.Parameter(value, requires_grad=original.requires_grad))


def computed_weights(model: nn.Module) -> list[Tensor]:
    """The tensors with a grad_fn that hooks have set as plain attributes; these cannot be deep-copied."""
    held = (value for module in nn.Module.modules(model) for value in module.__dict__.values())
    return [value for value in held if isinstance(value, Tensor) and value.grad_fn is not None]
