"""Copies of modules that share tensors until somebody writes them."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from fxmerge.weights.by_path import Weights

M = TypeVar("M", bound=nn.Module)


def deep_copy(module: M, shared: Iterable[Tensor]) -> M:
    """`copy.deepcopy` of a module, but for tensors that stay shared.

    deepcopy takes longer than a small model's forward, nearly all of it for the many empty dicts of plain modules; so
    their fields are copied here, and deepcopy is left what else they hold, and modules that say how they are copied.
    """
    memo: dict[int, Any] = {id(t): t for t in shared}
    modules = list(module.modules())
    classes = {cls: _plain(cls) for cls in {type(m) for m in modules}}
    plain = [m for m in modules if classes[type(m)] and "__deepcopy__" not in m.__dict__]
    for m in plain:
        memo[id(m)] = type(m).__new__(type(m))
    for m in plain:
        state: dict[str, Any] = m.__getstate__()  # type: ignore[no-untyped-call]
        copied = {name: v if type(v) in _ATOMS else _field(v, memo) for name, v in state.items()}
        memo[id(m)].__setstate__(copied)
    return copy.deepcopy(module, memo)


def _plain(cls: type[nn.Module]) -> bool:
    """Does deepcopy copy these modules field by field, and nothing else?"""
    own_ways = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
    return (
        not hasattr(cls, "__deepcopy__")
        and cls not in copyreg.dispatch_table
        and all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in own_ways)
        and not any("__slots__" in base.__dict__ for base in cls.__mro__)
    )


def _field(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) is tuple and all(type(v) in _ATOMS for v in value):
        return value
    if id(value) in memo or not (type(value) in (dict, OrderedDict) or (type(value) in (list, set) and not value)):
        return copy.deepcopy(value, memo)
    copied = memo[id(value)] = type(value)()
    if value:
        for name, one in value.items():
            copied[name if type(name) in _ATOMS else _field(name, memo)] = (
                one if type(one) in _ATOMS else _field(one, memo)
            )
    return copied


_ATOMS = frozenset((int, float, bool, str, type(None)))


def sharing_copy(module: fx.GraphModule) -> tuple[fx.GraphModule, Weights]:
    """A copy of a module that still shares all of its tensors, and the weights to make them its own one by one."""
    held = (d for m in module.modules() for d in (m._parameters, m._buffers, m.__dict__))
    tensors = [v for values in held for v in values.values() if isinstance(v, Tensor)]
    copied = deep_copy(module, tensors)
    return copied, Weights(copied, frozenset(id(t) for t in tensors))
