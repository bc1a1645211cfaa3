"""Output on terminals and in pipes whose encoding has no box-drawing characters, such as ASCII and Latin-1."""

from __future__ import annotations

import codecs
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_HANDLER = "fxmerge.plain"
_SIGNS = {  # a word in the name of a character -> a similar one
    "DASH": "-", "MINUS": "-", "BULLET": "*", "DOT": ".", "MULTIPLICATION": "x", "RIGHTWARDS ARROW": ">",
    "QUOTATION": "'",
}  # fmt: skip


@contextmanager
def plain_where_needed() -> Iterator[None]:
    """While it is open, characters that stdout or stderr cannot encode are written as similar ASCII characters."""
    codecs.register_error(_HANDLER, _similar)
    streams = [(s, s.encoding, s.errors) for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    for stream, encoding, _ in streams:
        stream.reconfigure(encoding="ascii" if _asks_for_ascii() else encoding, errors=_HANDLER)
    try:
        yield
    finally:
        for stream, encoding, errors in streams:
            stream.reconfigure(encoding=encoding, errors=errors)


def _asks_for_ascii() -> bool:
    """Whether the user set the C locale. Python itself writes UTF-8 there (PEP 538 and 540), whatever the terminal."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG")
    return locale in ("C", "POSIX") and not os.environ.get("PYTHONIOENCODING") and os.environ.get("PYTHONUTF8") != "1"


def _similar(error: UnicodeError) -> tuple[str, int]:
    """The error handler: one ASCII character for each, so that the columns of a table stay aligned."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(letter: str) -> str:
    name = unicodedata.name(letter, "")
    if name.startswith("BOX DRAWINGS"):
        across, down = "LEFT" in name or "RIGHT" in name or "HORIZONTAL" in name, "UP" in name or "DOWN" in name
        if "VERTICAL" in name:
            return "+" if across else "|"
        return "+" if across and down else "-" if across else "|"
    plain = unicodedata.normalize("NFKD", letter)[:1]
    if plain.isascii() and plain.isprintable():
        return plain
    return next((sign for word, sign in _SIGNS.items() if word in name), "?")
