"""Models on the meta device, which have shapes but no values. They can be analysed, since labels need no values."""

from __future__ import annotations

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxmerge.weights.by_path import Weights


def make_fake(model: nn.Module) -> bool:
    """Replaces weights on the meta device by fake tensors on the CPU, in place. Returns whether there were any.

    The results of ops on fake tensors are fake too: they have a shape but no values. Other tensors keep their values.
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
