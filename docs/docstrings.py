"""Shows this project's docstrings in the documentation site: lines that begin with `name: ` become a list.

mkdocstrings loads it (mkdocs.yml). A docstring says its arguments and fields as `name: what it is`, one to a line, and
what it raises in a sentence at the end; Markdown would run them together.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_NAMED = re.compile(r"^ {0,4}(\w[\w, ]*?): +(?=\S)")


def as_list(text: str) -> str:
    """The text with its named lines as a Markdown list, and with a paragraph for what is raised."""
    found: list[str] = []
    inside = False  # a list item, whose further lines are indented
    for line in text.splitlines():
        named = _NAMED.match(line)
        if named and not line.startswith(("http:", "https:")):
            found += ([] if inside else [""]) + [f"- `{named[1]}`: {line[named.end() :]}"]
            inside = True
        elif inside and line.startswith("  "):
            found.append(f"  {line.strip()}")
        else:
            if inside or line.startswith("Raises "):
                found.append("")
            inside = False
            found.append(line)
    return "\n".join(found)


class NamedLines(Extension):
    """Applies `as_list` to every docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
