"""Measures the rows of a benchmark one by one, each in its own process, and appends them to a file as they come."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import process
from benchmarks.harness.rows import Row, append_row

Key = tuple[Any, ...]


def measure(
    key: Key, fields: Sequence[str], findings: Callable[..., Iterable[Row]], arguments: Sequence[Any], limit: float
) -> Row:
    """One row: the key under its names `fields`, all findings, wall-clock seconds, and `error` if it failed.

    The process is stopped after `limit` CPU seconds (see process.py).
    """
    found, wall = process.measured(findings, arguments, limit)
    ended = found.pop("ended", "")
    if ended:
        found["error"] = f"{ended}, in {found.get('stage', 'start')}"
    return {**dict(zip(fields, key, strict=True)), **found, "wall": wall}


def run(
    todo: Sequence[Key], row: Callable[[Key], Row], line: Callable[[Row], str], path: Path, console: Console
) -> None:
    """Measure rows and append each to the file; on a terminal, show `line` of each."""
    for number, key in enumerate(todo, 1):
        with console.status(" ".join(map(str, key[1:]))):
            found = row(key)
        append_row(path, found)
        console.print(f"{number}/{len(todo)} {line(found)}", markup=False, soft_wrap=True)
