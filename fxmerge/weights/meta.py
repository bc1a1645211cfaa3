"""Blank models: on the meta device, with shapes and no values. They can be analysed, as labels need no values."""

from __future__ import annotations

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxmerge.weights.by_path import Weights


def blanked(model: nn.Module) -> bool:
    """Were there weights on the meta device? They now act as if they were on the CPU, in a module changed in place.

    What such a weight meets becomes a shape too (torch's fake tensors); other tensors keep their values.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    bare = {name: value for name, value in held if value.is_meta}
    if bare:
        mode, into = FakeTensorMode(allow_non_fake_inputs=True), Weights(model)
        for name, value in bare.items():
            with mode:
                empty = value.new_empty(value.shape, device="cpu")
            into.replace(name, empty)
    return bool(bare)
