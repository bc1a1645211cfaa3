"""Files of JSON lines from which a stopped benchmark resumes: one row for each measurement."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path, fields: Sequence[str]) -> dict[tuple[Any, ...], Row]:
    """The rows of a file by the values of `fields`. A later line replaces an earlier one with the same key.

    An incomplete line, left by a stopped run, is skipped.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[tuple(row[field] for field in fields)] = row
    return rows


def append_row(path: Path, row: Row) -> None:
    """Append a row in one write, on a new line even if the last line is incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
