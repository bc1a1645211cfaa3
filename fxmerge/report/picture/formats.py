"""A picture as text for other programs: DOT, SVG laid out by Graphviz, Mermaid, and Model Explorer's JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from fxmerge.errors import FxMergeError
from fxmerge.report.picture.frames import overview
from fxmerge.report.picture.records import Box, Picture

SVG_BOXES = 300  # boxes in an SVG, at most
MERMAID_BOXES, MERMAID_ARROWS = 150, 500  # Mermaid does not draw more than 500 arrows by default
PLAIN, REFUSED = "#e8e8e8", "#b3261e"


def dot(picture: Picture) -> str:
    """The picture in Graphviz's DOT language: modules are clusters, and channels have the colour of their group."""
    lines = [
        f"digraph {_quoted(picture.title)} {{",
        '  graph [fontname="Helvetica", fontsize=11, color="#999999", style=rounded, labeljust=l, ranksep=0.35];',
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=11, height=0.3];',
        '  edge [color="#888888", arrowsize=0.6];',
        *_clusters(picture, "", "  "),
    ]
    for arrow in picture.arrows:
        lines.append(f"  {_quoted(arrow.source)} -> {_quoted(arrow.target)}{_look(picture, arrow.groups)};")
    return "\n".join([*lines, "}", ""])


def _clusters(picture: Picture, frame: str, indent: str) -> Iterator[str]:
    inner: dict[str, list[int]] = defaultdict(list)
    for number, f in enumerate(picture.frames):
        inner[f.parent].append(number)
    boxes: dict[str, list[Box]] = defaultdict(list)
    for box in picture.boxes:
        boxes[box.frame].append(box)

    def level(frame: str, indent: str) -> Iterator[str]:
        for box in boxes[frame]:
            yield f"{indent}{_quoted(box.id)} [{_box(picture, box)}];"
        for number in inner[frame]:
            f = picture.frames[number]
            yield f"{indent}subgraph cluster_{number} {{"
            yield f"{indent}  label={_label(f.label)};"
            yield from level(f.id, indent + "  ")
            yield f"{indent}}}"

    yield from level(frame, indent)


def _box(picture: Picture, box: Box) -> str:
    details = " ".join(filter(None, (box.op if box.op != box.label else "", box.width)))
    label = f"{box.label}\n{details}" if details else box.label
    above, below = sides(box)
    colours = [tint(picture.shades[side[0]].colour) if side else PLAIN for side in (above or below, below or above)]
    fill = colours[0] if colours[0] == colours[1] else ":".join(colours)
    found = f'label={_label(label)}, fillcolor="{fill}", gradientangle=270'
    if box.refused:
        why = "\n".join(picture.refusals[r].reason for r in box.refused)
        found += f', style="rounded,filled,dashed", color="{REFUSED}", penwidth=2, tooltip={_label(why)}'
    return found


def sides(box: Box) -> tuple[list[int], list[int]]:
    """(groups that a box consumes, groups that it is otherwise part of or passes on)."""
    above = [g for g, role in box.roles if role == "consumer"]
    return above, [g for g, role in box.roles if role != "consumer"]


def tint(colour: str, share: float = 0.55) -> str:
    """A colour mixed with white, so that black text on it is legible."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(255 * share + part * (1 - share)):02x}" for part in parts)


def _look(picture: Picture, groups: tuple[int, ...]) -> str:
    if not groups:
        return ""
    colours = ":".join(picture.shades[g].colour for g in groups[:3])
    return f' [color="{colours}", penwidth={2 if len(groups) == 1 else 1.5}]'


def _label(text: str) -> str:
    """A label: a string in which Graphviz replaces entities, such as `&amp;`, by characters."""
    return _quoted(text.replace("&", "&amp;"))


def _quoted(text: str) -> str:
    """A string of the DOT language."""
    kept = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    return '"' + kept.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def svg(picture: Picture) -> str:
    """The picture as SVG, laid out by Graphviz. Inner modules of large networks are collapsed.

    Raises FxMergeError if Graphviz is not installed or fails.
    """
    program = shutil.which("dot")
    if program is None:
        raise FxMergeError(
            "an SVG is laid out by Graphviz, but its program `dot` was not found; install graphviz "
            "(apt-get install graphviz, brew install graphviz), or use .html(path), which does not need it"
        )
    text = dot(overview(picture, SVG_BOXES))
    done = subprocess.run([program, "-Tsvg"], input=text, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise FxMergeError(f"Graphviz could not draw this picture: {done.stderr.strip()}; use .html(path) instead")
    return done.stdout


def mermaid(picture: Picture) -> str:
    """The picture as a Mermaid flowchart. Inner modules are collapsed until it is small enough for Mermaid."""
    limit = MERMAID_BOXES
    small = overview(picture, limit)
    while len(small.arrows) > MERMAID_ARROWS and limit > 1:
        limit //= 2
        small = overview(picture, limit)
    number = {box.id: at for at, box in enumerate(small.boxes)}
    frames = {f.id: at for at, f in enumerate(small.frames)}
    lines = ["flowchart TD"]

    def level(frame: str, indent: str) -> Iterator[str]:
        for box in small.boxes:
            if box.frame == frame:
                texts = [_entity(box.label), _entity(box.width)] if box.width else [_entity(box.label)]
                yield f'{indent}n{number[box.id]}["{"<br/>".join(texts)}"]'
        for f in small.frames:
            if f.parent == frame:
                yield f'{indent}subgraph f{frames[f.id]}["{_entity(f.label)}"]'
                yield from level(f.id, indent + "  ")
                yield f"{indent}end"

    lines += level("", "  ")
    lines += [f"  n{number[a.source]} --> n{number[a.target]}" for a in small.arrows]
    worn: dict[int, list[str]] = defaultdict(list)
    for box in small.boxes:
        above, below = sides(box)
        if above or below:
            worn[(below or above)[0]].append(f"n{number[box.id]}")
    for group, boxes in sorted(worn.items()):
        colour = small.shades[group].colour
        lines.append(f"  classDef g{group} fill:{tint(colour)},stroke:{colour},color:#111")
        lines.append(f"  class {','.join(boxes)} g{group}")
    refused = [f"n{number[box.id]}" for box in small.boxes if box.refused]
    if refused:
        lines.append(f"  classDef refused stroke:{REFUSED},stroke-width:2px,stroke-dasharray:4 3")
        lines.append(f"  class {','.join(refused)} refused")
    flowing: dict[int, list[str]] = defaultdict(list)
    for at, arrow in enumerate(small.arrows):
        if arrow.groups:
            flowing[arrow.groups[0]].append(str(at))
    for group, arrows in sorted(flowing.items()):
        lines.append(f"  linkStyle {','.join(arrows)} stroke:{small.shades[group].colour},stroke-width:2px")
    return "\n".join([*lines, ""])


def _entity(text: str) -> str:
    """Text for a Mermaid label: all but plain characters are written as Mermaid's entities."""
    return "".join(c if c.isalnum() or c in " ._·→-" else f"#{ord(c)};" for c in text)


def model_explorer(picture: Picture) -> tuple[str, str]:
    """(node data, graph) as two JSON texts for Model Explorer. The graph is named "main".

    The value of a node is the percentage of its channels that are kept; its colour is that of its group.
    """
    results, nodes = {}, []
    arrows: dict[str, list[str]] = defaultdict(list)
    for arrow in picture.arrows:
        arrows[arrow.target].append(arrow.source)
    for box in picture.boxes:
        above, below = sides(box)
        share = 100 * box.after / box.before if box.before else 100.0
        colour = picture.shades[(below or above)[0]].colour if above or below else PLAIN
        results[box.id] = {"value": round(share, 2), "bgColor": tint(colour), "textColor": "#111111"}
        attributes = {
            "operation": box.op,
            "channels": box.width,
            "group": ", ".join(picture.shades[g].name for g in below),
            "consumed groups": ", ".join(picture.shades[g].name for g in above),
            "not merged": "; ".join(picture.refusals[r].reason for r in box.refused),
        }
        nodes.append(
            {
                "id": box.id,
                "label": box.label,
                "namespace": box.frame.replace(".", "/"),
                "attrs": [{"key": key, "value": value} for key, value in attributes.items() if value],
                "incomingEdges": [
                    {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(at)}
                    for at, source in enumerate(arrows[box.id])
                ],
            }
        )
    gradient = [{"stop": 0, "bgColor": "#f4b8b3"}, {"stop": 1, "bgColor": "#ffffff"}]
    data = {"main": {"name": "kept channels, %", "results": results, "gradient": gradient}}
    graph: dict[str, Any] = {"label": picture.title, "graphs": [{"id": "main", "nodes": nodes}]}
    return json.dumps(data, indent=1), json.dumps(graph, indent=1)
