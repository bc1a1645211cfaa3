"""Copies of modules that share their tensors with the original until they are written."""

from __future__ import annotations

import copy
import copyreg
import gc
from collections import OrderedDict
from collections.abc import Iterable
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxmerge.weights.by_path import Weights
from fxmerge.weights.closures import rebind

M = TypeVar("M", bound=nn.Module)


def sharing_copy(module: fx.GraphModule) -> tuple[fx.GraphModule, Weights]:
    """A copy of a module that shares all of its tensors, and its `Weights`, which copy a tensor before writing it."""
    held = (d for m in nn.Module.modules(module) for d in (m._parameters, m._buffers, m.__dict__))
    tensors = [v for values in held for v in values.values() if isinstance(v, Tensor)]
    copied = deep_copy(module, tensors)
    return copied, Weights(copied, frozenset(id(t) for t in tensors))


def deep_copy(module: M, shared: Iterable[Tensor]) -> M:
    """A `copy.deepcopy` of a module, except that the tensors in `shared` are not copied.

    Functions that hold modules of the original, such as lambdas and hooks, hold those of the copy. A module inside
    torch.compile's or DataParallel's wrapper is copied without it.

    `copy.deepcopy` takes longer than a forward of a small model, mostly for the many empty dicts of plain modules. So
    the fields of plain modules are copied here. Their other values, and modules that define how they are copied, are
    left to `copy.deepcopy`. Tensors with a history, which `copy.deepcopy` refuses, are detached. Other objects that it
    refuses, such as Python modules, locks and open files, are shared.
    """
    known: list[object] = list(shared)
    try:
        return _copied(module, known)
    except RuntimeError:
        with _Detached():
            return _copied(module, known)
    except TypeError:
        if not (uncopied := _uncopied(module)):
            raise
        return _copied(module, [*known, *uncopied])


def _uncopied(module: nn.Module) -> list[object]:
    """What the fields of a module and of its submodules hold, at any depth, that cannot be copied."""
    waiting: list[object] = [value for m in nn.Module.modules(module) for value in m.__dict__.values()]
    seen, found = set[int](), list[object]()
    while waiting:
        value = waiting.pop()
        atom = type(value) in _ATOMS or isinstance(value, type | FunctionType | Tensor | nn.Module)
        if atom or id(value) in seen:
            continue
        seen.add(id(value))
        try:
            if not isinstance(value, (dict, list, tuple, set)) and not hasattr(value, "__deepcopy__"):
                value.__reduce_ex__(4)
        except TypeError:
            found.append(value)
        else:
            waiting += gc.get_referents(value)
    return found


class _Detached(TorchFunctionMode):
    """Copies tensors that were computed under autograd without their history."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            args[1][id(args[0])] = args[0].detach().clone()
            return args[1][id(args[0])]
        return func(*args, **(kwargs or {}))


def _copied(module: M, shared: Iterable[object]) -> M:
    memo: dict[int, Any] = {id(t): t for t in shared}
    modules = list(nn.Module.modules(module))
    classes = {cls: _plain(cls) for cls in {type(m) for m in modules}}
    wrapped = {m: inside(m) for m in modules if inside(m) is not m}
    plain = [m for m in modules if classes[type(m)] and "__deepcopy__" not in m.__dict__ and m not in wrapped]
    for m in plain:
        memo[id(m)] = type(m).__new__(type(m))
    for m, inner in wrapped.items():
        if id(inner) in memo:
            memo[id(m)] = memo[id(inner)]
    for m in plain:
        state: dict[str, Any] = m.__getstate__()  # type: ignore[no-untyped-call]
        copied = {name: v if type(v) in _ATOMS else _field(v, memo) for name, v in state.items()}
        memo[id(m)].__setstate__(copied)
    made: M = copy.deepcopy(module, memo)
    rebind(nn.Module.modules(made), memo)
    return made


def inside(module: nn.Module) -> nn.Module:
    """The module that wrappers of torch.compile, DataParallel and DistributedDataParallel call; any other as it is."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")  # the class itself is not imported: that takes a second
        else:
            return module


_ATOMS = frozenset((int, float, bool, str, type(None)))  # immutable types, which need no copy


def _plain(cls: type[nn.Module]) -> bool:
    """Returns whether `copy.deepcopy` copies modules of this class field by field and does nothing else."""
    own_ways = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
    return (
        not hasattr(cls, "__deepcopy__")
        and cls not in copyreg.dispatch_table
        and all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in own_ways)
        and not any("__slots__" in base.__dict__ for base in cls.__mro__)
    )


def _field(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of one field of a plain module; anything but dicts, empty lists and empty sets is left to deepcopy."""
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
