"""The tables of a report."""

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


def share_text(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def tables_text(*tables: Table | str, width: int = 120) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    for table in tables:
        console.print(table, highlight=False, markup=False)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def right_columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def refusal_table(refusals: Sequence[Refusal], captured: Capture) -> Table:
    """The layers that stay, those that hold back most parameters first."""
    from rich.table import Table

    table = Table(title="Left as it was", title_justify="left")
    table.add_column("layer", overflow="fold")
    right_columns(table, "channels", "parameters")
    table.add_column("reason", overflow="fold")
    table.add_column("source", overflow="fold")
    held = {r: parameters_held(r, captured) for r in refusals}
    for r in sorted(refusals, key=lambda r: -held[r]):
        table.add_row(r.name, str(r.channels), f"{held[r]:,}", r.reason, r.where)
    return table


def refit_table(refitted: Sequence[Refitted]) -> Table:
    from rich.table import Table

    table = Table(title="Refitted", title_justify="left")
    table.add_column("layer", overflow="fold")
    right_columns(table, "error before", "after")
    table.add_column("note", overflow="fold")
    for r in refitted:
        table.add_row(r.name, f"{r.before:.4f}", f"{r.after:.4f}", r.note)
    return table


def listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def left_out_line(captured: Capture) -> str:
    return f"\nleft out of the output: {', '.join(captured.left_out)}" if captured.left_out else ""
