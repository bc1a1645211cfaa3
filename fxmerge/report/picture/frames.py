"""Frames: the modules that contain the boxes of a picture, nested by path, and smaller pictures with some collapsed.

A frame that contains a single item is left out; its name is prepended to the item's label. A frame with very many
items is divided into runs, so that an opened frame always shows a moderate number of items.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fxmerge.report.picture.records import Arrow, Box, Frame, Picture

MANY = 64  # a frame with more items is divided into runs
RUN = 32  # items in a run
SHOWN = 24  # boxes and collapsed frames that the page shows at first


@dataclass
class _Node:
    """A frame in the making."""

    id: str
    label: str
    inside: list[_Node | int] = field(default_factory=list)  # frames, and boxes by index
    ends: tuple[str, str] | None = None  # of a run: the labels of its first and its last item


def nested(paths: Sequence[str]) -> tuple[list[tuple[str, str]], list[Frame]]:
    """The frames for boxes in the modules `paths`, and (id of its frame, prefix of its label) for each box."""
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
    """The single item of a frame, with the frame's name prepended; the frame itself if it has several items."""
    if len(node.inside) != 1:
        return node
    child = node.inside[0]
    if isinstance(child, _Node):
        child.label = f"{node.label}.{child.label}"
    return child


def _divide(node: _Node) -> None:
    """Divide a frame into runs, and these into runs again, until it has at most MANY items."""
    while len(node.inside) > MANY:
        runs: list[_Node | int] = []
        for start in range(0, len(node.inside), RUN):
            inside = node.inside[start : start + RUN]
            first, last = inside[0], inside[-1]
            if isinstance(first, _Node) and isinstance(last, _Node):
                ends = (first.ends or (first.label,))[0], (last.ends or (last.label,))[-1]
            else:  # a box, which has no label yet
                ends = str(start + 1), str(start + len(inside))
            runs.append(_Node(f"{node.id}[{_first(first)}:{_last(last)}]", " … ".join(ends), inside, ends))
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
    """Append all frames to `frames`, outer ones first, and write each box's frame and prefix into `places`."""
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
    """The frames to open so that at most `limit` boxes and collapsed frames are visible: whole levels, outermost first.

    homes: the id of each box's frame
    """
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
        opened |= set(level)
        seen += sum(inside[f] - 1 for f in level)
        level = [inner for f in level for inner in children[f]]
    return frozenset(opened)


def overview(picture: Picture, limit: int) -> Picture:
    """The picture with at most `limit` boxes, as far as its frames allow: each collapsed frame becomes one box."""
    opened = open_frames(picture.frames, [b.frame for b in picture.boxes], limit)
    frames = {f.id: f for f in picture.frames}
    shut: dict[str, str] = {"": ""}  # frame -> the outermost collapsed frame around it, or ""
    for f in picture.frames:
        shut[f.id] = shut[f.parent] or ("" if f.id in opened else f.id)
    shown: dict[str, list[Box]] = {}  # id of a new box -> the boxes that it replaces
    for box in picture.boxes:
        collapsed = shut[box.frame]
        shown.setdefault(f"module:{collapsed}" if collapsed else box.id, []).append(box)
    boxes = [
        _collapsed(name, frames[shut[inside[0].frame]], inside) if shut[inside[0].frame] else inside[0]
        for name, inside in shown.items()
    ]
    home = {box.id: name for name, inside in shown.items() for box in inside}
    arrows: dict[tuple[str, str], Arrow] = {}
    for arrow in picture.arrows:
        source, target = ends = home[arrow.source], home[arrow.target]
        if source != target:
            known = arrows.get(ends, Arrow(source, target, (), arrow.through))
            arrows[ends] = replace(known, groups=tuple(sorted({*known.groups, *arrow.groups})))
    inner = tuple(f for f in picture.frames if f.id in opened)
    return replace(picture, boxes=tuple(boxes), arrows=tuple(arrows.values()), frames=inner)


def _collapsed(name: str, frame: Frame, inside: list[Box]) -> Box:
    """One box in place of the boxes of a frame."""
    kinds = Counter(box.kind for box in inside)
    return Box(
        id=name,
        label=frame.label,
        frame=frame.parent,
        op=f"{len(inside)} boxes, {kinds['producer']} with weights",
        kind="module",
        nodes=tuple(n for box in inside for n in box.nodes),
        modules=tuple(m for box in inside for m in box.modules),
        before=inside[-1].before,
        after=inside[-1].after,
        roles=tuple(dict.fromkeys(role for box in inside for role in box.roles)),
        refused=tuple(dict.fromkeys(r for box in inside for r in box.refused)),
    )
