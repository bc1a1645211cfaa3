"""Overview: a picture with its inner frames closed, so that drawings of large models stay of a size one can read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fxmerge.report.picture.frames import open_frames
from fxmerge.report.picture.records import Arrow, Box, Picture


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
    told = f"{len(inside)} boxes, {kinds['writer']} with weights"
    last = inside[-1]
    return Box(
        name, label, parent, told, "module", nodes, modules, last.before, last.after, tuple(roles), tuple(refused)
    )
