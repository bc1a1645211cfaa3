"""Parts of generated code: literals, line breaks, paths to submodules, and the names of local variables."""

from __future__ import annotations

import itertools
import keyword
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxmerge.errors import FxMergeError

TOKEN = "\0(\\w+)\0"  # a value that has no name yet; no literal contains the character NUL
_NAMES = ("x", "y", "z", "u", "v", "w", "a", "b", "c", "d")


def token(name: str) -> str:
    """A placeholder in code for the name of a value."""
    return f"\0{name}\0"


def named(lines: Sequence[tuple[str, str]], given: Sequence[str]) -> list[str]:
    """The lines of code with names in place of tokens.

    A value that is used for the last time passes its name on to the value assigned in that line.

    lines: (token that the line assigns or "", code)
    given: tokens that keep their own text as name (parameters); others take it over only if it is in _NAMES
    """
    last = {found: number for number, (_, code) in enumerate(lines) for found in re.findall(TOKEN, code)}
    held = {name: name for name in given if name in last}  # token -> name of the values that are still used
    fresh = (n for n in itertools.chain(_NAMES, (f"x{i}" for i in itertools.count(1))) if n not in given)
    free: list[str] = []
    code = []

    def order(name: str) -> tuple[int, str]:
        return _NAMES.index(name) if name in _NAMES else len(_NAMES) + len(name), name

    for number, (made, text) in enumerate(lines):
        text = re.sub(TOKEN, lambda m: held[m[1]], text)
        free += [held.pop(dead) for dead in list(held) if last[dead] <= number]
        if made:
            free = sorted((n for n in free if n not in given or n in _NAMES), key=lambda n: (n not in given, order(n)))
            name = held[made.strip("\0")] = free.pop(0) if free else next(fresh)
            text = f"{name} = {text}"
        code.append(text)
    return code


def literal(value: Any) -> str:
    """A constant as code. Raises FxMergeError for a type that has no literal."""
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, str):
        return '"' + repr(value)[1:-1].replace('"', '\\"') + '"' if "'" not in value else repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or value is Ellipsis or type(value) in (int, float, bool, complex):
        return "..." if value is Ellipsis else repr(value)
    raise FxMergeError(f"a constant of type {type(value).__name__} in the graph cannot be written to a model.py")


def broken(line: str, indent: int, width: int = 120) -> list[str]:
    """A line of code, broken at its last bracket and then at the commas if it is longer than `width`."""
    space = " " * indent
    comma = "," if line.endswith(",") else ""
    line = line.removesuffix(",")
    if indent + len(line + comma) <= width or line[-1] not in ")]}":
        return [space + line + comma]
    stack, pairs = list[int](), dict[int, int]()
    for place, letter in enumerate(line):
        if letter in "([{":
            stack.append(place)
        elif letter in ")]}":
            pairs[place] = stack.pop()
    start = pairs[len(line) - 1]
    body = line[start + 1 : -1]
    if indent + 4 + len(body) <= width:
        return [space + line[: start + 1], space + "    " + body, space + line[-1] + comma]
    cuts, depth = [-1], 0
    for place, letter in enumerate(body):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            cuts.append(place)
    parts = [body[a + 1 : b].strip() for a, b in zip(cuts, [*cuts[1:], len(body)], strict=True)]
    inner = [text for part in parts if part for text in broken(part + ",", indent + 4, width)]
    return [space + line[: start + 1], *inner, space + line[-1] + comma]


def access(module: nn.Module, path: str) -> str:
    """The code that gets a submodule or parameter from a module: `.layer1[0].conv1`."""
    code, owner = "", module
    for part in path.split("."):
        code += entry(owner, part)
        owner = getattr(owner, part)
    return code


def entry(owner: nn.Module, name: str) -> str:
    """The code that gets a child or parameter from its owner: `.conv1`, `[0]`, `["key"]`."""
    names = children(owner)
    if name not in names or in_attributes(names):
        return f".{name}"
    if isinstance(owner, fx.GraphModule) and not in_order(names):  # the model itself is neither a list nor a dict
        return f'.get_submodule("{name}")'
    return f"[{name}]" if in_order(names) else f'["{name}"]'


def children(owner: nn.Module) -> list[str]:
    """The names of a module's children."""
    return [name for name, child in owner._modules.items() if child is not None]


def in_order(names: Sequence[str]) -> bool:
    """Whether the names are 0, 1, 2, ..., as in a list."""
    return bool(names) and sorted(names) == sorted(map(str, range(len(names))))


def in_attributes(names: Sequence[str]) -> bool:
    """Whether all names can be written as attributes."""
    return all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
