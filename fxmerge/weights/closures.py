"""Functions that hold objects of a model in their closures or defaults, made to hold those of a copy.

`copy.deepcopy` does not copy functions. A lambda that `__init__` stored, or a hook, would therefore call modules of the
original and write its results into the original.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

_CONTAINERS = (list, tuple, dict, set)


def rebind(modules: Iterable[nn.Module], memo: dict[int, Any]) -> None:
    """Replaces functions in the fields of copied modules by functions that hold copies, in place.

    modules: the copies
    memo: that of the `copy.deepcopy` that made them: {id of an object: its copy}
    """
    made: dict[int, Any] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            changed = _rebound(value, memo, made)
            if changed is not value:
                vars(module)[name] = changed


def _rebound(value: Any, memo: dict[int, Any], made: dict[int, Any]) -> Any:
    """A field with its functions replaced; dicts and lists are changed in place. The value itself if none is."""
    kind = type(value)
    if kind is types.FunctionType:
        return _function(value, memo, made)
    if kind in (dict, list) or isinstance(value, dict):
        if id(value) in made:  # a container may hold itself
            return value
        made[id(value)] = value
    if isinstance(value, functools.partial) and kind is functools.partial:
        function = _rebound(value.func, memo, made)
        return value if function is value.func else functools.partial(function, *value.args, **value.keywords)
    if isinstance(value, dict):
        for key, one in value.items():
            changed = _rebound(one, memo, made) if not isinstance(one, nn.Module) else one
            if changed is not one:
                value[key] = changed
    elif kind is list:
        value[:] = [_rebound(one, memo, made) for one in value]
    elif kind is tuple:
        changed = tuple(_rebound(one, memo, made) for one in value)
        return changed if any(a is not b for a, b in zip(changed, value, strict=True)) else value
    return value


def _function(function: types.FunctionType, memo: dict[int, Any], made: dict[int, Any]) -> types.FunctionType:
    if id(function) in made:
        found: types.FunctionType = made[id(function)]
        return found
    made[id(function)] = function  # a function may hold itself
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    cells = [c for c in function.__closure__ or () if not _empty(c)]
    held = [*given, *(c.cell_contents for c in cells)]
    if all(_held(value, memo, made) is value for value in held):
        return function
    own = function.__closure__ or ()
    closure = tuple(types.CellType() if _empty(c) else types.CellType(c.cell_contents) for c in own)
    fresh = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
    made[id(function)] = fresh
    functools.update_wrapper(fresh, function)
    vars(fresh).pop("__wrapped__", None)
    vars(fresh).update(vars(function))
    for cell in closure:
        if not _empty(cell):
            cell.cell_contents = _held(cell.cell_contents, memo, made)
    fresh.__defaults__ = tuple(_held(v, memo, made) for v in function.__defaults__ or ()) or None
    fresh.__kwdefaults__ = {k: _held(v, memo, made) for k, v in (function.__kwdefaults__ or {}).items()} or None
    return fresh


def _held(value: Any, memo: dict[int, Any], made: dict[int, Any]) -> Any:
    """What the copy's function holds in place of a value: its copy, or itself where nothing was copied."""
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is types.FunctionType:
        return _function(value, memo, made)
    if isinstance(value, types.MethodType):
        owner = _held(value.__self__, memo, made)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if type(value) in _CONTAINERS and _reaches(value, memo, set()):
        return copy.deepcopy(value, memo)
    return value


def _reaches(value: Any, memo: dict[int, Any], seen: set[int]) -> bool:
    """Whether a container holds an object that was copied."""
    if id(value) in memo:
        return True
    if type(value) not in _CONTAINERS or id(value) in seen:
        return False
    seen.add(id(value))
    return any(_reaches(v, memo, seen) for v in (value.values() if isinstance(value, dict) else value))


def _empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
