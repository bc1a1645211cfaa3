"""A merged model as a readable Python file: plain torch.nn code with the user's names and with sizes as literals.

The functions below raise FxMergeError for what such a file cannot contain: a class or function from outside torch,
torchvision and timm, or a layer that does not hold its constructor's arguments as attributes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.export.source.expressions import LIBRARIES, Body
from fxmerge.export.source.names import access, broken, children, in_attributes, in_order, literal

_HEAD = '''"""{name}, merged by fxmerge: {count:,} parameters.

`load()` gives the model with the weights of weights.safetensors, which stands beside this file.
"""

import json
{standard}from pathlib import Path

import torch
{others}

class MergedModel({base}):
    def __init__(self):
        super().__init__()
'''

_LOAD = '''

def load(weights=Path(__file__).with_name("weights.safetensors")):
    """The model in evaluation mode, with its weights."""
    model = MergedModel().eval()
    data = bytearray(Path(weights).read_bytes())  # safetensors: the header's length, the header, the tensors
    start = 8 + int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8:start]), torch.frombuffer(data, dtype=torch.uint8)[start:]
    for name, tensor in model.state_dict().items():
        begin, end = header[name]["data_offsets"]
        tensor.copy_(tensors[begin:end].view(tensor.dtype).view(header[name]["shape"]))
    return model
'''


def source(module: fx.GraphModule, name: str, plain: bool = True) -> str:
    """The text of a model.py with `class MergedModel` and `load()`, for a graph returned by `layers.layered`.

    name:  the class of the original model, for the docstring
    plain: see `expressions.Body`
    """
    body = Body(module, plain)
    init = [line for text in _init(module, body.imports) for line in broken(text, 8)]
    forward = [line for text in body.lines for line in broken(text, 8)]
    signature = broken(f"def forward({', '.join(['self', *body.signature])})", 4)
    signature[-1] += ":"
    code = "\n".join([*init, "", *signature, *forward])
    functional = ["import torch.nn.functional as F"] if re.search(r"\bF\.", code) else []
    others = [*functional, "from torch import nn"]
    count = sum(p.numel() for p in module.parameters())
    standard = sorted(i for i in body.imports if i.startswith("import "))
    foreign = sorted(i for i in body.imports if not i.startswith("import "))
    head = _HEAD.format(
        name=name,
        base="nn.Sequential" if in_order(children(module)) else "nn.Module",
        count=count,
        standard="".join(f"{line}\n" for line in standard),
        others="\n".join(sorted([*others, *foreign], key=_order)) + "\n",
    )
    return head + code + "\n" + _LOAD


def _order(line: str) -> tuple[bool, str]:
    return (not line.startswith("import"), line.split()[1])


def _init(root: fx.GraphModule, imports: set[str]) -> Iterator[str]:
    """The lines of `__init__`, without indentation."""
    called = {id(root.get_submodule(str(n.target))) for n in root.graph.nodes if n.op == "call_module"}
    fetched = {str(n.target) for n in root.graph.nodes if n.op == "get_attr"}
    floats = {t.dtype for t in [*root.parameters(), *root.buffers()] if t.is_floating_point()}
    known: dict[int, str] = {}  # module or parameter -> its code
    ties: list[str] = []

    def note(owner: nn.Module, code: str, path: str) -> None:
        for inner, value in owner.named_parameters():
            place = code + access(owner, inner)
            if id(value) in known:
                ties.append(f"{place} = {known[id(value)]}")
            known.setdefault(id(value), place)

    def raw(owner: nn.Module, code: str, path: str) -> Iterator[str]:
        for name, value in list(owner._parameters.items()):
            if value is not None and id(value) in known:
                ties.append(f"{code}.{name} = {known[id(value)]}")
            elif value is not None:
                frozen = "" if value.requires_grad else ", requires_grad=False"
                known[id(value)] = f"{code}.{name}"
                yield f"{code}.{name} = nn.Parameter({_empty(value)}{frozen})"
        loose = {k: v for k, v in vars(owner).items() if isinstance(v, Tensor)}
        for name, held in [*owner._buffers.items(), *loose.items()]:
            kept = name in owner._buffers and name not in owner._non_persistent_buffers_set
            if held is not None and (kept or f"{path}.{name}".lstrip(".") in fetched):
                yield f'{code}.register_buffer("{name}", {_empty(held)})'

    def put(owner: nn.Module, place: str, name: str, made: str) -> str:
        if owner is not root or in_attributes(children(root)):
            return f"{place} = {made}"
        return f"self.append({made})" if in_order(children(root)) else f'self.add_module("{name}", {made})'

    def walk(owner: nn.Module, code: str, path: str) -> Iterator[str]:
        yield from raw(owner, code, path)
        listed = in_order(children(owner))
        for name in sorted(children(owner), key=int) if listed else children(owner):
            child = owner.get_submodule(name)
            place, inner = code + access(owner, name), f"{path}.{name}".lstrip(".")
            names = children(child)
            if id(child) in known:
                yield put(owner, place, name, known[id(child)])
            elif id(child) in called or type(child) in LAYERS:
                known[id(child)] = place
                yield put(owner, place, name, f"{constructor(child, imports)}{_cast(child, floats)}")
                note(child, place, inner)
                if names and not isinstance(child, nn.Sequential):
                    raise FxMergeError(
                        f"{inner} is a {type(child).__name__}, which cannot be written with plain layers"
                    )
            else:
                known[id(child)] = place
                if in_order(names):
                    yield put(owner, place, name, f"nn.ModuleList(nn.Module() for _ in range({len(names)}))")
                elif owner is root or not listed or not in_attributes(names):
                    yield put(owner, place, name, f"nn.Module{'' if in_attributes(names) else 'Dict'}()")
                yield from walk(child, place, inner)

    yield from walk(root, "self", "")
    yield from ties
    if len(floats) == 1 and torch.float32 not in floats:
        yield f"self.to({literal(floats.pop())})"
    for path, value in root.named_parameters():
        if not value.requires_grad and value.is_floating_point() and f"{path}" not in fetched:
            yield f"self{access(root, path)}.requires_grad_(False)"


LAYERS = tuple(
    cls for cls in vars(nn).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module)
    and cls not in (nn.Module, nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.Container)
)  # fmt: skip


def _cast(layer: nn.Module, floats: set[torch.dtype]) -> str:
    own = {t.dtype for t in [*layer.parameters(), *layer.buffers()] if t.is_floating_point()}
    return f".to({literal(own.pop())})" if len(floats) > 1 and len(own) == 1 and torch.float32 not in own else ""


def _empty(value: Tensor) -> str:
    sizes = ", ".join(map(str, value.shape)) or "()"
    dtype = "" if value.dtype in (torch.float32,) else f", dtype={literal(value.dtype)}"
    return f"torch.empty({sizes}{dtype})"


def constructor(layer: nn.Module, imports: set[str]) -> str:
    """The call that creates such a layer: `nn.Conv2d(64, 32, 3, padding=1, bias=False)`."""
    if type(layer) is nn.Sequential:
        return f"nn.Sequential({', '.join(constructor(m, imports) for m in layer)})"
    cls: Any = next((c for c in type(layer).__mro__ if _same_forward(c, layer) and _public(c)), None)
    if cls is None:
        raise FxMergeError(
            f"{type(layer).__module__}.{type(layer).__name__} is not a class of torch, torchvision or timm"
        )
    name = f"nn.{cls.__name__}"
    if getattr(nn, cls.__name__, None) is not cls:
        name = cls.__name__
        imports.add(f"from {cls.__module__} import {name}")
    signature = inspect.signature(cls)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        signature = inspect.signature(cls.__mro__[1])  # LSTM(*args) passes them to its base class
    given, placed = [], ("device", "dtype", *(("mode",) if issubclass(cls, nn.RNNBase) else ()))
    for parameter in signature.parameters.values():
        starred = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if starred or parameter.name in placed:
            continue
        value = _argument(layer, parameter)
        if value is parameter.empty or value == parameter.default:
            continue
        keyword = "" if parameter.default is parameter.empty else f"{parameter.name}="
        given.append(f"{keyword}{_value(value)}")
    if isinstance(layer, nn.RNN) and layer.nonlinearity != "tanh":  # RNN(*args, **kwargs) does not list it
        given.append(f"nonlinearity={layer.nonlinearity!r}")
    return f"{name}({', '.join(given)})"


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
