"""Which rule a call has."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxmerge.graph.ops import Aten, overload_name
from fxmerge.rules.rule import Module, Rule, Spelling
from fxmerge.rules.table import RULES


def key(spelling: Spelling) -> Any:
    """What a graph's node is looked up by: the module class, the function, the method's name or the dotted name."""
    return spelling.cls if isinstance(spelling, Module) else spelling


def dotted(target: Any) -> str:
    """A function's dotted name, `torchvision.ops.stochastic_depth.stochastic_depth`."""
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


def spellings() -> Iterator[tuple[Any, Rule, Spelling]]:
    """(key, rule, spelling) of every row, users' own rows included."""
    for rule in RULES.values():
        for spelling in rule.spellings:
            yield key(spelling), rule, spelling


def table() -> dict[Any, tuple[Rule, Spelling]]:
    """RULES by key, as the interpreter looks them up; made anew where rows were added or changed."""
    global _made
    rows = tuple(RULES.values())
    if len(rows) != len(_made[0]) or not all(map(operator.is_, rows, _made[0])):
        _made = rows, {k: (rule, spelling) for k, rule, spelling in spellings()}
    return _made[1]


_made: tuple[tuple[Rule, ...], dict[Any, tuple[Rule, Spelling]]] = (), {}


def find(target: Any, known: dict[Any, tuple[Rule, Spelling]]) -> tuple[Rule, Spelling] | None:
    """The row of a function or method; an aten op's is that of the function or method of the same name."""
    name = overload_name(target)
    if name is None:
        return known.get(target) or known.get(dotted(target))
    for spelling in (Aten(name), getattr(F, name, None), getattr(torch, name, None), name):
        if spelling is not None and spelling in known:
            return known[spelling]
    return None


def module_class(module: nn.Module, known: dict[Any, tuple[Rule, Spelling]]) -> type[nn.Module] | None:
    """The class in the table whose forward this module runs: itself, or a base whose forward it did not override."""
    for cls in type(module).__mro__:
        if cls in known and getattr(type(module), "forward", None) is getattr(cls, "forward", None):
            return cls
    return None


def describe(spelling: Spelling) -> str:
    """The name that users know a spelling by: `nn.ReLU`, `F.relu`, `.relu()`."""
    target = key(spelling)
    if isinstance(target, Aten):
        return f"aten.{target.name}"
    if isinstance(target, str):
        return f".{target}()"
    if inspect.isclass(target):
        return f"nn.{target.__name__}"
    return str(getattr(target, "__name__", math.nan))
