"""Memory formats of weights: a weight in channels_last stays so when it is replaced by a smaller one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORY_FORMATS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def format_of(value: Tensor) -> torch.memory_format | None:
    """channels_last or channels_last_3d for a dense tensor with these strides; None for any other."""
    found = _FORMATS.get(value.dim())
    if found is None or value.layout is not torch.strided or value.is_meta or not value.numel():
        return None
    # not by is_contiguous, which takes a kernel of one element for both formats
    strides = torch.empty(value.shape, device="meta", memory_format=found).stride()
    plain = torch.empty(value.shape, device="meta").stride()
    return found if value.stride() == strides != plain else None


def in_format(value: Tensor, old: Tensor) -> Tensor:
    """A tensor in the memory format of the one that it replaces; itself where that has none."""
    found = format_of(old) if type(value) in (Tensor, nn.Parameter) and value.dim() == old.dim() else None
    if found is None or format_of(value) is found:
        return value
    return torch.empty_like(value, memory_format=found, requires_grad=False).copy_(value.detach())


def memory_format(value: Tensor) -> str:
    """The entry of MEMORY_FORMATS that a tensor is stored in; "" for any other format."""
    found = format_of(value)
    return "" if found is None else str(found).removeprefix("torch.")


def memory_formats(module: nn.Module) -> dict[str, str]:
    """{tensor of the state_dict: its `memory_format`}, without those that have none."""
    found = {name: memory_format(value) for name, value in module.state_dict().items()}
    return {name: form for name, form in found.items() if form}
