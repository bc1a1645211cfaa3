"""The tables of a report and the short texts in their cells."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Refusal
from fxmerge.refit.refit_layers import Refitted
from fxmerge.report.refusals import parameters_held

if TYPE_CHECKING:
    from rich.table import Table


def render(*parts: Table | str, width: int = 120) -> str:
    """Tables and texts below each other, as plain text of at most `width` columns."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    for part in parts:
        console.print(part, highlight=False, markup=False)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def new_table(title: str, first: str) -> Table:
    """An empty table with a title and a first column for names."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    return table


def add_text_columns(table: Table, *names: str) -> None:
    """Add left-aligned columns whose texts may be folded."""
    for name in names:
        table.add_column(name, overflow="fold")


def add_number_columns(table: Table, *names: str) -> None:
    """Add right-aligned columns that are never wrapped."""
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def refusal_table(refusals: Sequence[Refusal], captured: Capture) -> Table:
    """The channels that were not merged and why, those with the most parameters first."""
    table = new_table("Not merged", "layer")
    add_number_columns(table, "channels", "parameters")
    add_text_columns(table, "reason", "source line")
    held = {r: parameters_held(r, captured) for r in refusals}
    for r in sorted(refusals, key=lambda r: -held[r]):
        table.add_row(r.name, str(r.channels), f"{held[r]:,}", r.reason, r.where)
    return table


def refit_table(refitted: Sequence[Refitted]) -> Table:
    """The layers that were considered for refit, with the relative square error of their outputs."""
    table = new_table("Refit", "layer")
    add_number_columns(table, "error before", "error after")
    add_text_columns(table, "note")
    for r in refitted:
        table.add_row(r.name, f"{r.before:.4f}", f"{r.after:.4f}", r.note)
    return table


def percent(part: float, whole: float) -> str:
    """The share of `part` in `whole`, such as `42.0 %`; `-` if `whole` is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def first_names(names: Sequence[str]) -> str:
    """At most four names, followed by the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def left_out_line(captured: Capture) -> str:
    """A line with the outputs of the model that capture left out, or an empty text."""
    return f"\nleft out of the output: {', '.join(captured.left_out)}" if captured.left_out else ""
