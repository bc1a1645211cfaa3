"""Look up the rule of a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxmerge.graph.ops import Aten, overload_name
from fxmerge.rules.rule import Module, Rule, Spelling
from fxmerge.rules.table import RULES


def key(spelling: Spelling) -> Any:
    """The key that a spelling is looked up by: a module class, a function, a method's name or a dotted name."""
    return spelling.cls if isinstance(spelling, Module) else spelling


def dotted(target: Any) -> str:
    """A function's dotted name, `torchvision.ops.stochastic_depth.stochastic_depth`."""
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


def spellings() -> Iterator[tuple[Any, Rule, Spelling]]:
    """(key, rule, spelling) of every row, including rows that users added."""
    for rule in RULES.values():
        for spelling in rule.spellings:
            yield key(spelling), rule, spelling


def rule_of(node: fx.Node, module: fx.GraphModule) -> Rule | None:
    """The rule of a node's call; None for a call without a row, and for a node that is not a call."""
    if node.op == "call_module":
        return rule_of_module(module.get_submodule(str(node.target)))
    return rule_of_target(node.target) if node.op in ("call_function", "call_method") else None


def rule_of_target(target: Any) -> Rule | None:
    """The rule of a function or of a method's name. An aten op has the rule of the function or method of its name."""
    known, name = _by_key(), overload_name(target)
    if name is None:
        spelled: tuple[Any, ...] = (target, dotted(target))
    else:
        space, _, rest = name.partition("_")
        apart = getattr(_SPACES.get(space), rest, None)  # aten.fft_rfft is torch.fft.rfft
        spelled = (Aten(name), getattr(F, name, None), getattr(torch, name, None), apart, name)
    return next((known[s][0] for s in spelled if s is not None and s in known), None)


_SPACES = {"fft": torch.fft, "linalg": torch.linalg, "special": torch.special}


def rule_of_module(module: nn.Module) -> Rule | None:
    """The rule of a module: that of its class, or of a base class whose forward it does not override."""
    row = _row_of_module(module)
    return None if row is None else row[0]


def takes_params(module: nn.Module) -> bool:
    """Does the rule of a module take all of its parameters, as the argument `params`?"""
    row = _row_of_module(module)
    return row is not None and isinstance(row[1], Module) and row[1].params


def attributes_of(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a module that its rule takes as arguments: ("weight", "bias") of nn.Linear."""
    row = _row_of_module(module)
    return row[1].attributes if row is not None and isinstance(row[1], Module) else ()


def _row_of_module(module: nn.Module) -> tuple[Rule, Spelling] | None:
    known, forward = _by_key(), getattr(type(module), "forward", None)
    for cls in type(module).__mro__:
        if cls in known and forward is getattr(cls, "forward", None):
            return known[cls]
    return None


def _by_key() -> dict[Any, tuple[Rule, Spelling]]:
    """RULES by key, rebuilt when rows were added or changed."""
    global _made
    rows = tuple(RULES.values())
    if rows != _made[0]:
        _made = rows, {k: (rule, spelling) for k, rule, spelling in spellings()}
    return _made[1]


_made: tuple[tuple[Rule, ...], dict[Any, tuple[Rule, Spelling]]] = (), {}


def describe(spelling: Spelling) -> str:
    """A spelling as users know it: `nn.ReLU`, `relu`, `.relu()`."""
    target = key(spelling)
    if isinstance(target, Aten):
        return f"aten.{target.name}"
    if isinstance(target, str):
        return f".{target}()"
    if inspect.isclass(target):
        return f"nn.{target.__name__}"
    return str(getattr(target, "__name__", target))


def name_of(rule: Rule | None) -> str:
    """The name of a rule, or ""."""
    return "" if rule is None else rule.name
