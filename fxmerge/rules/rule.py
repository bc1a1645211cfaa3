"""The record of a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxmerge.ir.provenance import Kind

Spelling = Any  # a module class, a function, a method name, or Module(...)


@dataclass(frozen=True)
class Module:
    """A module class and the functional arguments that its attributes stand for."""

    cls: type[nn.Module]
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One op: its kind, what it does to labels, and every way of spelling it.

    commutes: f(s x) = s f(x) for every s > 0 (ReLU, pooling, any linear map); False is the safe answer
    """

    name: str
    kind: Kind
    apply: Callable[..., Any]
    spellings: tuple[Spelling, ...]
    commutes: bool | Callable[..., bool] = field(default=False)
