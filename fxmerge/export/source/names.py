"""Parts of generated code: literals, line breaks, and the names of local variables."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

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
    if isinstance(value, complex):
        return f"complex({literal(value.real)}, {literal(value.imag)})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, str):
        text = repr(str(value))
        return '"' + text[1:-1].replace('"', '\\"') + '"' if "'" not in value else text
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    for kind in (bool, int, float):  # also of their subclasses, such as an IntEnum or a float of numpy
        if isinstance(value, kind):
            return repr(kind(value))
    if value is None or value is Ellipsis:
        return "..." if value is Ellipsis else "None"
    raise FxMergeError(f"a constant of type {type(value).__name__} in the graph cannot be written to a model.py")


def broken(line: str, indent: int, width: int = 120) -> list[str]:
    """A line of code, broken at its last bracket and then at the commas if it is longer than `width`."""
    space = " " * indent
    comma = "," if line.endswith(",") else ""
    line = line.removesuffix(",")
    if indent + len(line + comma) <= width or line[-1] not in ")]}":
        return [space + line + comma]
    stack, pairs = list[int](), dict[int, int]()
    for place, letter in _code(line):
        if letter in "([{":
            stack.append(place)
        elif letter in ")]}":
            pairs[place] = stack.pop()
    start = pairs[len(line) - 1]
    body = line[start + 1 : -1]
    if indent + 4 + len(body) <= width:
        return [space + line[: start + 1], space + "    " + body, space + line[-1] + comma]
    cuts, depth = [-1], 0
    for place, letter in _code(body):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            cuts.append(place)
    parts = [body[a + 1 : b].strip() for a, b in zip(cuts, [*cuts[1:], len(body)], strict=True)]
    inner = [text for part in parts if part for text in broken(part + ",", indent + 4, width)]
    return [space + line[: start + 1], *inner, space + line[-1] + comma]


_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')


def _code(line: str) -> Iterator[tuple[int, str]]:
    """(place, letter) of a line of code, without the letters of its strings."""
    strings = {place for found in _STRINGS.finditer(line) for place in range(*found.span())}
    return ((place, letter) for place, letter in enumerate(line) if place not in strings)
