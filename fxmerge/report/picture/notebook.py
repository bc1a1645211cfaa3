"""What a notebook shows for a report: a small table, and a button that opens the page."""

from __future__ import annotations

import base64
import gzip
import html
from collections.abc import Sequence

# Unpacks the page and opens it in a new tab, or below the button where the notebook allows no new tabs. (In the handler
# of an attribute, the plain name of the class would be the address of the document.)
_OPEN = """(async (button) => {
const tab = window.open(), packed = Uint8Array.from(atob(button.dataset.page), (c) => c.charCodeAt(0));
const page = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
const url = window.URL.createObjectURL(new Blob([await new Response(page).blob()], {type: 'text/html'}));
if (tab) { tab.location = url; return; }
const frame = document.createElement('iframe');
frame.style = 'display: block; width: 100%; height: 720px; border: 0';
frame.src = url;
button.replaceWith(frame);
})(this)"""


def cell(title: str, rows: Sequence[tuple[str, str]], notes: Sequence[str], page: str) -> str:
    """HTML text: a table of (name, value), notes below it, and the button, which holds the packed page."""
    packed = base64.b64encode(gzip.compress(page.encode("utf-8"), mtime=0)).decode("ascii")
    lines = "".join(
        f'<tr><th style="text-align: left">{html.escape(name)}</th><td style="text-align: right">{html.escape(value)}'
        "</td></tr>"
        for name, value in rows
    )
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return (
        f"<div><b>{html.escape(title)}</b><table>{lines}</table>{below}"
        f'<button onclick="{html.escape(_OPEN)}" data-page="{packed}">Open the page</button></div>'
    )
