"""Frames: modules that boxes lie in, nested by path. Dotted paths go in; nothing here knows of graphs or groups.

A frame with one thing in it is left out, and its name goes before the thing's own. One with very many is divided into
runs, so that whatever is opened stays small.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fxmerge.report.picture.records import Arrow, Box, Frame, Picture

MANY = 64  # things in a frame from which on it is divided
RUN = 32  # things in each of the runs
SHOWN = 110  # boxes and closed frames that are shown at first


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


def overview(picture: Picture, limit: int) -> Picture:
    """The same picture with no more than `limit` boxes where frames allow it; a closed frame becomes one box."""
    opened = open_frames(picture.frames, [b.frame for b in picture.boxes], limit)
    parents = {f.id: f.parent for f in picture.frames}
    labels = {f.id: f.label for f in picture.frames}
    shut: dict[str, str] = {"": ""}  # frame -> the outermost closed frame around it, or ""
    for f in picture.frames:
        shut[f.id] = shut[f.parent] or ("" if f.id in opened else f.id)
    shown: dict[str, list[Box]] = {}
    for box in picture.boxes:
        shown.setdefault(_name(shut[box.frame]) or box.id, []).append(box)
    boxes = [
        _closed(name, labels[shut[inside[0].frame]], parents[shut[inside[0].frame]], inside)
        if shut[inside[0].frame]
        else inside[0]
        for name, inside in shown.items()
    ]
    stands = {box.id: name for name, inside in shown.items() for box in inside}
    arrows: dict[tuple[str, str], Arrow] = {}
    for arrow in picture.arrows:
        ends = (stands[arrow.source], stands[arrow.target])
        if ends[0] != ends[1]:
            told = arrows.get(ends, Arrow(*ends, (), arrow.through))
            arrows[ends] = replace(told, groups=tuple(sorted({*told.groups, *arrow.groups})))
    frames = tuple(f for f in picture.frames if f.id in opened)
    return replace(picture, boxes=tuple(boxes), arrows=tuple(arrows.values()), frames=frames)


def _name(frame: str) -> str:
    return f"module:{frame}" if frame else ""


def _closed(name: str, label: str, parent: str, inside: list[Box]) -> Box:
    kinds = Counter(box.kind for box in inside)
    roles = dict.fromkeys(role for box in inside for role in box.roles)
    refused = dict.fromkeys(r for box in inside for r in box.refused)
    nodes = tuple(n for box in inside for n in box.nodes)
    modules = tuple(m for box in inside for m in box.modules)
    told = f"{len(inside)} boxes, {kinds['producer']} with weights"
    last = inside[-1]
    return Box(
        name, label, parent, told, "module", nodes, modules, last.before, last.after, tuple(roles), tuple(refused)
    )
