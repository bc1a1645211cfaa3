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


def progress_line(row: Row, title: str, measured: str, left: str) -> str:
    """One line about a row: its title, then `measured` and `left` with the values of the row, where it has them.

    They are formats, such as "perplexity {perplexity:.2f}" and "{flops:.1%} of the FLOPs".
    """
    parts = [_filled(measured, row) or row.get("error", "failed")[:160], _filled(left, row), f"{row['wall']:.0f} s"]
    return f"{title}: {', '.join(part for part in parts if part)}"


def _filled(text: str, row: Row) -> str:
    """A format with the row's values; empty if the row lacks one."""
    try:
        return text.format(**row)
    except KeyError:
        return ""
