"""Samples between samples, on which an original's outputs say more than on those it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.errors import FxMergeError


def mixed(values: Sequence[Any]) -> list[Any]:
    """A batch whose samples are means of two of its samples, with weights drawn at random between 0 and 1.

    values: inputs of a model; floating-point tensors of n samples are mixed, with the same weights and partners in
        all of them, and what has no axis of samples stays as it is (mixup, Zhang et al., ICLR 2018; as the inputs of
        a teacher, Beyer et al., CVPR 2022).
    Raises FxMergeError for samples that are no floating-point tensors, such as token ids.
    """
    count = next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 0)
    shares, partners = torch.rand(count), torch.randperm(count)

    def between(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != count:
            return value
        if not value.is_floating_point():
            raise FxMergeError(f"mix needs inputs that are floating-point tensors; one is {value.dtype}: leave mix out")
        share = shares.to(value).reshape(-1, *[1] * (value.dim() - 1))
        return value + share * (value[partners.to(value.device)] - value)

    return [between(value) for value in values]
