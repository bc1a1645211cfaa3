"""How generated code holds and reaches what a module holds: as attributes, in a list or a dict, or by name.

A name that cannot be written as an attribute, such as `0`, `a-b`, `class` or `__x` (which Python changes inside a
class), is an entry of a list or a dict where the module holds nothing else, and is else reached by `getattr`.
"""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from typing import Literal

from torch import fx, nn

from fxmerge.export.source.names import literal

Form = Literal["attributes", "list", "dict", "names"]


def reached(code: str, module: nn.Module, path: str) -> str:
    """The code that gets a submodule or tensor from the module that `code` stands for: `self.layer1[0].conv1`."""
    owner = module
    for part in path.split("."):
        code, owner = _entry(code, owner, part), getattr(owner, part)
    return code


def assigned(code: str, owner: nn.Module, name: str, value: str) -> str:
    """The line that makes the parameter or buffer `value` a tensor of the module that `code` stands for."""
    place = _entry(code, owner, name)
    if not place.startswith("getattr("):
        return f"{place} = {value}"
    kind = "parameter" if name in owner._parameters else "buffer"
    return f"{code}.register_{kind}({literal(name)}, {value})"


def _entry(code: str, owner: nn.Module, name: str) -> str:
    """The code that gets a child or tensor from its owner: `.conv1`, `[0]`, `["key"]`."""
    if name in children(owner):
        form = form_of(owner)
        if form == "names":
            return f"{code}.get_submodule({literal(name)})"
    else:
        form = parameter_form(owner)
        if form == "names" and not is_attribute(name):
            return f"getattr({code}, {literal(name)})"
    if form in ("attributes", "names"):
        return f"{code}.{name}"
    return f"{code}[{name}]" if form == "list" else f"{code}[{literal(name)}]"


def form_of(owner: nn.Module) -> Form:
    """How the children of a module are held."""
    names = children(owner)
    if in_order(names):
        return "list"
    if all(map(is_attribute, names)):
        return "attributes"
    root = isinstance(owner, fx.GraphModule)  # the model itself is neither a list nor a dict
    return "names" if root or any(hasattr(nn.ModuleDict, name) for name in names) else "dict"


def parameter_form(owner: nn.Module) -> Form:
    """How the parameters of a module are held: in a list or dict only if it holds nothing else."""
    names = [name for name, value in owner._parameters.items() if value is not None]
    others = children(owner) or any(value is not None for value in owner._buffers.values())
    if all(map(is_attribute, names)):
        return "attributes"
    if isinstance(owner, fx.GraphModule) or type(owner) not in _HOLDERS or others:
        return "names"
    if in_order(names):
        return "list"
    return "names" if any(hasattr(nn.ParameterDict, name) for name in names) else "dict"


_HOLDERS = (nn.Module, nn.ParameterList, nn.ParameterDict)  # classes of modules that only hold parameters


def children(owner: nn.Module) -> list[str]:
    """The names of a module's children."""
    return [name for name, child in owner._modules.items() if child is not None]


def in_order(names: Sequence[str]) -> bool:
    """Whether the names are 0, 1, 2, ..., as in a list."""
    return bool(names) and sorted(names) == sorted(map(str, range(len(names))))


def is_attribute(name: str) -> bool:
    """Whether a name can be written as an attribute inside a class, where Python changes names such as `__x`."""
    mangled = name.startswith("__") and not name.endswith("__")
    return name.isidentifier() and not keyword.iskeyword(name) and not mangled
