"""Compares the outputs of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.graph.eval_mode import evaluating, reproducible
from fxmerge.graph.nested import fresh
from fxmerge.graph.outputs import returned


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a merged model with the original on the example inputs."""

    error: float  # |merged - original| / |original|, over all outputs together


def outputs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The floating-point tensors that a model returns in evaluation mode, in order. Training flags are restored."""
    with evaluating(module), torch.no_grad(), reproducible():
        return returned(module(*fresh(list(args)), **fresh(dict(kwargs or {}))))


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """|one - other| / |one| over all tensors together; infinite where shapes differ or values are not finite."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    apart = sum(
        float((a.detach().double() - b.detach().double()).square().sum()) for a, b in zip(one, other, strict=True)
    )
    whole = sum(float(a.detach().double().square().sum()) for a in one)
    found = (apart / max(whole, 1e-300)) ** 0.5
    return found if found == found else float("inf")
