"""Around a fault of oneDNN 3.12 (torch 2.14) on processors with AVX2 and without AVX-512.

Its gradient of the weight of a 1x1 convolution with stride and at most 6 input channels writes beyond its memory if
images are laid out channels-last. The process then aborts, at any later time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

FEW = 8  # input channels of a vector of AVX2


def without_faults(
    convolutions: Iterable[tuple[Tensor, tuple[int, ...]]],
) -> contextlib.AbstractContextManager[None]:
    """A context for gradients of weights, in which torch's own kernels run if oneDNN's might be at fault.

    convolutions: (weight, strides) of each layer
    """
    if any(strides and max(strides) > 1 and w.size(1) < FEW and max(w.shape[2:]) == 1 for w, strides in convolutions):
        flags: contextlib.AbstractContextManager[None] = torch.backends.mkldnn.flags(enabled=False)
        return flags
    return contextlib.nullcontext()
