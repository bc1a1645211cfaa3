"""Frames: modules that boxes lie in, nested by path. Dotted paths go in; nothing here knows of graphs or groups.

A frame with one thing in it is left out, and its name goes before the thing's own. One with very many is divided into
runs, so that whatever is opened stays small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

MANY = 64  # things in a frame from which on it is divided
RUN = 32  # things in each of the runs
SHOWN = 110  # boxes and closed frames that are shown at first


@dataclass(frozen=True)
class Frame:
    """A module with several boxes, or a run of them: id, name within its parent, the parent's id or ""."""

    id: str
    label: str
    parent: str
    opened: bool = True


@dataclass
class _Node:
    id: str
    label: str
    inside: list[_Node | int] = field(default_factory=list)  # frames, and boxes by index


def nested(paths: Sequence[str]) -> tuple[list[tuple[str, str]], list[Frame]]:
    """For boxes in modules `paths`: (id of the frame, what to put before the box's name) of each, and the frames."""
    root = _Node("", "")
    known = {"": root}
    for number, path in enumerate(paths):
        parts = path.split(".") if path else []
        for depth in range(len(parts)):
            here = ".".join(parts[: depth + 1])
            if here not in known:
                known[here] = _Node(here, parts[depth])
                known[".".join(parts[:depth])].inside.append(known[here])
        known[path].inside.append(number)
    places: list[tuple[str, str]] = [("", "")] * len(paths)
    frames: list[Frame] = []
    for node in reversed(known.values()):  # inner ones first
        node.inside = [_only(child) if isinstance(child, _Node) else child for child in node.inside]
        _divide(node)
    _place(root, places, frames, paths)
    opened = open_frames(frames, [frame for frame, _ in places], SHOWN)
    return places, [Frame(f.id, f.label, f.parent, f.id in opened) for f in frames]


def _only(node: _Node) -> _Node | int:
    """What stands for a frame: the frame, or the one thing that is in it."""
    if len(node.inside) != 1:
        return node
    child = node.inside[0]
    if isinstance(child, _Node):
        child.label = f"{node.label}.{child.label}"
    return child


def _divide(node: _Node) -> None:
    while len(node.inside) > MANY:
        runs: list[_Node | int] = []
        for start in range(0, len(node.inside), RUN):
            inside = node.inside[start : start + RUN]
            ends = [child.label.split(" … ")[-at] if isinstance(child, _Node) else "" for at, child in
                    ((0, inside[0]), (1, inside[-1]))]  # fmt: skip
            label = " … ".join(ends) if all(ends) else f"{start + 1} … {start + len(inside)}"
            runs.append(_Node(f"{node.id}[{_first(inside[0])}:{_last(inside[-1])}]", label, inside))
        node.inside = runs


def _first(child: _Node | int) -> int:
    while isinstance(child, _Node):
        child = child.inside[0]
    return child


def _last(child: _Node | int) -> int:
    while isinstance(child, _Node):
        child = child.inside[-1]
    return child


def _place(root: _Node, places: list[tuple[str, str]], frames: list[Frame], paths: Sequence[str]) -> None:
    stack: list[_Node] = [root]
    while stack:
        node = stack.pop()
        inner = []
        for child in node.inside:
            if isinstance(child, _Node):
                frames.append(Frame(child.id, child.label, node.id))
                inner.append(child)
            else:
                module = node.id.partition("[")[0]
                before = paths[child][len(module) :].lstrip(".") if paths[child] != module else ""
                places[child] = (node.id, f"{before}." if before else "")
        stack.extend(reversed(inner))


def open_frames(frames: Sequence[Frame], homes: Sequence[str], limit: int) -> frozenset[str]:
    """Frames to open so that no more than `limit` boxes and closed frames are seen: whole levels, outer ones first."""
    inside: dict[str, int] = defaultdict(int)
    children: dict[str, list[str]] = defaultdict(list)
    for home in homes:
        inside[home] += 1
    for f in frames:
        inside[f.parent] += 1
        children[f.parent].append(f.id)
    opened: set[str] = set()
    seen, level = inside[""], children[""]
    while level and seen + sum(inside[f] - 1 for f in level) <= limit:
        seen += sum(inside[f] - 1 for f in level)
        opened.update(level)
        level = [inner for f in level for inner in children[f]]
    return frozenset(opened)
