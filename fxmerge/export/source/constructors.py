"""The call that creates a layer: its class, and its arguments read from the layer's attributes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fxmerge.errors import FxMergeError
from fxmerge.export.source.expressions import LIBRARIES
from fxmerge.export.source.names import literal

LAYERS = tuple(
    cls for cls in vars(nn).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module)
    and cls not in (nn.Module, nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList, nn.Sequential)
    and cls is not nn.Container
)  # fmt: skip


def constructor(layer: nn.Module, imports: set[str]) -> str:
    """The call that creates such a layer: `nn.Conv2d(64, 32, 3, padding=1, bias=False)`."""
    if type(layer) is nn.Sequential:
        return f"nn.Sequential({', '.join(constructor(m, imports) for m in layer)})"
    cls, given = _call(layer)
    name = f"nn.{cls.__name__}"
    if getattr(nn, cls.__name__, None) is not cls:
        name = cls.__name__
        imports.add(f"from {cls.__module__} import {name}")
    return f"{name}({', '.join(f'{keyword}{_value(value)}' for keyword, value in given)})"


def created(layer: nn.Module) -> nn.Module:
    """The layer that the call of `constructor` creates, on the meta device."""
    if type(layer) is nn.Sequential:
        return nn.Sequential(*map(created, layer))
    cls, given = _call(layer)
    keywords = {keyword.rstrip("="): value for keyword, value in given if keyword}
    with torch.device("meta"):
        made: nn.Module = cls(*(value for keyword, value in given if not keyword), **keywords)
    return made


def _call(layer: nn.Module) -> tuple[Any, list[tuple[str, Any]]]:
    """The class of a layer, and its arguments: (`name=` or "" for a positional one, value)."""
    cls: Any = next((c for c in type(layer).__mro__ if _same_forward(c, layer) and _public(c)), None)
    if cls is None:
        raise FxMergeError(
            f"{type(layer).__module__}.{type(layer).__name__} is not a class of torch, torchvision or timm"
        )
    signature = inspect.signature(cls)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        signature = inspect.signature(cls.__mro__[1])  # LSTM(*args) passes them to its base class
    given, placed = list[tuple[str, Any]](), ("device", "dtype", *(("mode",) if issubclass(cls, nn.RNNBase) else ()))
    for parameter in signature.parameters.values():
        starred = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if starred or parameter.name in placed:
            continue
        value = _argument(layer, parameter)
        if value is parameter.empty or value == parameter.default:
            continue
        keyword = "" if parameter.default is parameter.empty else f"{parameter.name}="
        given.append((keyword, value))
    if isinstance(layer, nn.RNN) and layer.nonlinearity != "tanh":  # RNN(*args, **kwargs) does not list it
        given.append(("nonlinearity=", layer.nonlinearity))
    complex_ = {t.dtype for t in layer.parameters() if t.is_complex()}
    if len(complex_) == 1 and "dtype" in signature.parameters:
        given.append(("dtype=", complex_.pop()))
    return cls, given


def _same_forward(cls: Any, layer: nn.Module) -> bool:
    return getattr(cls, "forward", None) is type(layer).forward


def _public(cls: type) -> bool:
    root = cls.__module__.split(".")[0]
    return getattr(nn, cls.__name__, None) is cls or (root in LIBRARIES and not cls.__module__.startswith("torch."))


def _argument(layer: nn.Module, parameter: inspect.Parameter) -> Any:
    """The argument that a layer was created with, from its attribute of that name; `empty` to use the default."""
    value: Any = getattr(layer, parameter.name, parameter.empty)
    if parameter.name == "bias" and not isinstance(value, bool):
        if parameter.name not in vars(layer) and parameter.name not in layer._parameters:
            value = getattr(layer, "in_proj_bias", None)
        return value is not None
    if isinstance(value, (Tensor, nn.Module)) or callable(value):
        value = parameter.empty
    if value is parameter.empty and parameter.default is parameter.empty:
        raise FxMergeError(f"{type(layer).__name__} does not hold its argument {parameter.name} as an attribute")
    alike = isinstance(value, tuple) and len(set(value)) == 1 and type(value[0]) is int
    squeezable = type(parameter.default) in (int, type(None)) or parameter.default is parameter.empty
    return value[0] if alike and squeezable and (len(value) == 1 or _spatial(layer)) else value


def _spatial(layer: nn.Module) -> bool:
    return any(word in type(layer).__name__ for word in ("Conv", "Pool"))


def _value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(_value, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return literal(value)
