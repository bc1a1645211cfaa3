"""Allocation: how many channels each group keeps. ALLOCATORS maps a name to a function of groups and options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from .errors import FxMergeError
from .ir import Group
from .options import Options


def rounded(keep: float, size: int, cells: int, round_to: int) -> int:
    """Channels that one of a group's cells keeps: at least 1, and such that the group's width is a multiple.

    Where the cell is too small for a multiple it stays as it is.
    """
    step = round_to // math.gcd(round_to, cells)
    if step == 1:
        return min(size, max(1, round(keep)))
    return min(size, max(step, math.floor(keep / step + 0.5) * step))


def uniform(groups: Sequence[Group], options: Options) -> dict[str, int]:
    """Every group keeps the share 1 - ratio, or what `keep` says: {group: channels kept in each cell}."""
    kept = {}
    for group in groups:
        cells = int(group.cells.max()) + 1
        size = group.channels // cells
        asked = next((v for pattern, v in options.keep.items() if fnmatchcase(group.name, pattern)), None)
        if asked is None:
            kept[group.name] = rounded(size * (1 - options.ratio), size, cells, options.round_to)
        elif isinstance(asked, int):
            if asked > group.channels or asked % cells:
                blocks = f", in {cells} blocks of {size} that must keep equally many" if cells > 1 else ""
                has = f"which has {group.channels}{blocks}"
                raise FxMergeError(f"keep asks for {asked} channels of {group.name}, {has}")
            kept[group.name] = asked // cells
        else:
            kept[group.name] = rounded(size * asked, size, cells, options.round_to)
    return kept


ALLOCATORS: dict[str, Callable[[Sequence[Group], Options], dict[str, int]]] = {"uniform": uniform}


def check_patterns(groups: Sequence[Group], modules: Sequence[str], options: Options) -> None:
    """Raise FxMergeError for a pattern of `keep` or `ignore` that matches nothing: a typing mistake, most likely."""
    known = [g.name for g in groups]
    for pattern in options.keep:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise FxMergeError(f"keep: {pattern!r} matches no group; the groups are {_some(known)}")
    for pattern in options.ignore:
        if not any(fnmatchcase(name, pattern) for name in (*known, *modules)):
            raise FxMergeError(f"ignore: {pattern!r} matches no module and no group; the groups are {_some(known)}")


def _some(known: Sequence[str]) -> str:
    return ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "") if known else "none"


def ignored(group: Group, options: Options) -> bool:
    """Does a pattern of `ignore` name the group or a module of it, or a module around one?"""
    names = [group.name, *(m.layer.module for m in (*group.writers, *group.carriers, *group.readers))]
    around = {".".join(name.split(".")[:n]) for name in names for n in range(1, len(name.split(".")) + 1)}
    return any(fnmatchcase(name, pattern) for pattern in options.ignore for name in around)
