"""A picture and the data of its groups as one self-contained HTML page, which needs no network and no server."""

from __future__ import annotations

import html
import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fxmerge.graph.nested import finite
from fxmerge.report.picture.records import Picture

SCRIPTS = (  # in the order in which they are run
    "vendor/d3.min.js", "vendor/elk.bundled.js.xz", "measures.js", "network.js", "scene.js", "camera.js", "widgets.js",
    "lists.js", "details.js", "channels.js", "panel.js", "choice.js", "save.js", "page.js",
)  # fmt: skip


def page(
    picture: Picture,
    summary: Mapping[str, Any],
    panels: Sequence[Mapping[str, Any]],
    layers: Sequence[Mapping[str, Any]],
) -> str:
    """The HTML text. Names of layers are safe whatever characters they have: they are only ever shown as text.

    summary: the figures in the header
    panels:  for each group of the picture, the data of its panel (`group_panels`)
    layers:  for each box of the picture, the data of its panel (`layer_panels`)
    """
    index = {box.id: at for at, box in enumerate(picture.boxes)}
    tables: dict[str, int] = {}  # what is said of a layer -> its number; layers of repeated blocks share one
    numbered = [
        [tables.setdefault(json.dumps(finite(each)), len(tables)) for each in layer["layers"]] for layer in layers
    ]
    shades = [{**asdict(shade), **panel} for shade, panel in zip(picture.shades, panels, strict=True)]
    data = {
        "title": picture.title,
        "summary": dict(summary),
        "groups": shades,
        "refusals": [asdict(r) for r in picture.refusals],
        "boxes": [
            {"label": b.label, "frame": b.frame, "op": b.op, "kind": b.kind, "modules": b.modules, "before": b.before,
             "after": b.after, "roles": b.roles, "refused": b.refused,
             "parameters": layer["parameters"], "flops": layer["flops"], "tables": numbers}
            for b, layer, numbers in zip(picture.boxes, layers, numbered, strict=True)
        ],
        "arrows": [[index[a.source], index[a.target], a.groups, " · ".join(a.through)] for a in picture.arrows],
        "tables": [json.loads(text) for text in tables],
        "frames": [{"id": f.id, "label": f.label, "parent": f.parent, "open": f.opened} for f in picture.frames],
    }  # fmt: skip
    fills = {
        "TITLE": html.escape(f"{picture.title} - fxmerge"),
        "STYLE": _asset("page.css"),
        "DRAWING": _asset("drawing.css"),
        "DATA": json.dumps(finite(data), separators=(",", ":")).replace("<", "\\u003c"),
        "SCRIPTS": "\n".join(f"<script>\n{_asset(name)}\n</script>" for name in SCRIPTS),
    }
    head, *rest = _asset("page.html").split("{{")
    return head + "".join(fills[name] + after for name, _, after in (part.partition("}}") for part in rest))


def _asset(name: str) -> str:
    folder = files("fxmerge") / "assets" if name.startswith("vendor/") else files(__package__) / "web"
    found = (folder / name).read_bytes()
    return (lzma.decompress(found) if name.endswith(".xz") else found).decode()
