"""A user's function that measures a model, such as its accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxmerge.errors import FxMergeError
from fxmerge.graph.eval_mode import evaluating

Evaluate = Callable[[nn.Module], Any]


def measured(evaluate: Evaluate | None, module: nn.Module) -> float | None:
    """What the function returns for a model in evaluation mode; None without a function.

    Raises FxMergeError for anything but a finite number.
    """
    if evaluate is None:
        return None
    with evaluating(module), torch.no_grad():
        given = evaluate(module)
    try:
        value = float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FxMergeError(f"evaluate returned a {type(given).__name__}; it should return one number") from error
    if not math.isfinite(value):
        raise FxMergeError(f"evaluate returned {value}; it should return a finite number")
    return value


def name_of(evaluate: Evaluate | None) -> str:
    """The name of the function in tables; "" without a function."""
    if evaluate is None:
        return ""
    name = getattr(evaluate, "__name__", type(evaluate).__name__)
    return name if name.isidentifier() else "value"
