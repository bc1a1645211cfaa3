"""Page: a picture and its groups' sheets as one HTML file that needs nothing else: no network, no server."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fxmerge.graph.nested import finite
from fxmerge.report.picture.records import Picture

SCRIPTS = ("vendor/d3.min.js", "vendor/elk.bundled.js", "network.js", "scene.js", "panel.js", "page.js")  # fmt: skip


def page(picture: Picture, summary: Mapping[str, Any], sheets: Sequence[Mapping[str, Any]]) -> str:
    """The HTML text. Names of any kind do no harm: they are data, and are only ever shown as text."""
    index = {box.id: at for at, box in enumerate(picture.boxes)}
    shades = [{**asdict(shade), **sheet} for shade, sheet in zip(picture.shades, sheets, strict=True)]
    data = {
        "title": picture.title,
        "summary": dict(summary),
        "groups": shades,
        "refusals": [asdict(r) for r in picture.refusals],
        "boxes": [
            {"label": b.label, "frame": b.frame, "op": b.op, "kind": b.kind, "modules": b.modules, "before": b.before,
             "after": b.after, "roles": b.roles, "refused": b.refused}
            for b in picture.boxes
        ],
        "arrows": [[index[a.source], index[a.target], a.groups, " · ".join(a.through)] for a in picture.arrows],
        "frames": [{"id": f.id, "label": f.label, "parent": f.parent, "open": f.opened} for f in picture.frames],
    }  # fmt: skip
    fills = {
        "TITLE": html.escape(f"{picture.title} - fxmerge"),
        "STYLE": _asset("page.css"),
        "DATA": json.dumps(finite(data), separators=(",", ":")).replace("<", "\\u003c"),
        "SCRIPTS": "\n".join(f"<script>\n{_asset(name)}\n</script>" for name in SCRIPTS),
    }
    head, *rest = _asset("page.html").split("{{")
    return head + "".join(fills[name] + after for name, _, after in (part.partition("}}") for part in rest))


def frame(text: str) -> str:
    """A page inside another, as notebooks show it."""
    return f'<iframe srcdoc="{html.escape(text)}" style="width: 100%; height: 720px; border: 0"></iframe>'


def _asset(name: str) -> str:
    folder = files("fxmerge") / "assets" if name.startswith("vendor/") else files(__package__) / "web"
    return (folder / name).read_text(encoding="utf-8")
