"""The outcome of a sweep: the cost and quality of a model merged at several budgets, as a table, a plot and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fxmerge.errors import FxMergeError
from fxmerge.graph.nested import finite
from fxmerge.planning.counted import named
from fxmerge.report.layout import WIDTH, Style, names, numbers, table, wrap
from fxmerge.report.picture.curve import curve
from fxmerge.report.tables import short
from fxmerge.weights.files import write_text

VERSION = 1  # of the format of the files in a folder


@dataclass(frozen=True, kw_only=True)
class Point:
    """One merged model, or a budget that could not be met.

    kind:     "flops", "params", "cache" or "latency"
    asked:    the budget, as a share of the original
    left:     the share of the original that is left
    noise:    the standard error of a latency; otherwise None
    error:    the relative error of the outputs on the example inputs
    value:    the value of `evaluate`, if it was given
    widths:   {group: channels kept}, for the groups that were narrowed
    notes:    requests that were not, or not fully, carried out
    failed:   why the budget could not be met; "" if it was
    of:       patterns of the modules whose cost was counted; empty for all of them
    """

    kind: str
    asked: float
    left: float = math.nan
    noise: float | None = None
    parameters: int = 0
    flops: int = 0
    error: float = math.nan
    value: float | None = None
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    failed: str = ""
    of: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        """What the budget is a share of."""
        return named(self.kind, self.of)


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, the largest budget first, and the original model as a point.

    measure: the name of the `evaluate` function; "" if there was none
    """

    original: Point
    points: tuple[Point, ...]
    measure: str = ""

    def text(self, width: int = 120, ascii: bool = False) -> str:
        """A table with a row for each budget, and below it the notes about them, as plain text.

        width: of the longest line, at least 20; columns that do not fit are left out
        ascii: use ASCII characters only
        """
        style, width, points = Style(ascii), max(width, WIDTH), (self.original, *self.points)

        def figures(cell: Callable[[Point], str]) -> list[str]:
            return ["" if p.failed else cell(p) for p in points]

        columns = [
            names("budget", ["original", *(f"{p.asked:.1%}" for p in self.points)]),
            numbers("left", ["not met" if p.failed else f"{p.left:.1%}" for p in points]),
            numbers("parameters", figures(lambda p: f"{p.parameters:,}"), figures(lambda p: short(p.parameters))),
            numbers("FLOPs", figures(lambda p: f"{p.flops:,}"), figures(lambda p: short(p.flops))),
            numbers("output error", figures(lambda p: f"{p.error:.3g}" if p.error == p.error else "not measurable")),
            numbers("seconds", figures(lambda p: f"{p.seconds:.0f}")),
        ]
        if self.measure:
            columns.insert(-1, numbers(self.measure, ["" if p.value is None else f"{p.value:.4g}" for p in points]))
        lines = table(f"Models merged to a share of the original's {self.original.counted}", columns, width, style)
        notes = [f"{p.asked:.1%}: {note}" for p in self.points for note in (p.failed, *p.notes) if note]
        return "\n".join([*lines, *(line for note in notes for line in wrap(note, width, style, 4)), ""])

    def __repr__(self) -> str:
        return f"<Sweep: {len(self.points)} budgets of {self.original.counted}>"

    def json(self) -> str:
        """JSON text: {"fxmerge_sweep", "original", "measure", "points"}, the fields of `Point`, and null for NaN."""
        original, *points = [finite(dataclasses.asdict(p)) for p in (self.original, *self.points)]
        data = {"fxmerge_sweep": VERSION, "original": original, "measure": self.measure, "points": points}
        return json.dumps(data, indent=1)

    def svg(self, path: str | Path | None = None) -> str:
        """A plot of the value, or without `evaluate` of the output error, against the share left in %, as SVG text.

        path: a file to write the text to, with the extension .svg
        Raises FxMergeError if nothing was met or measurable, or for another extension.
        """
        met = [p for p in self.points if not p.failed]
        if not met:
            raise FxMergeError("no budget of this sweep was met, so there is nothing to plot")
        points = [(100 * p.left, p.value if p.value is not None else p.error) for p in met]
        points = [point for point in points if math.isfinite(point[1])]
        if not points:
            raise FxMergeError("the output error of no budget was measurable, so there is nothing to plot")
        kind, up = self.original.counted, self.measure or "relative error of the outputs"
        level = (self.original.value, "original") if self.original.value is not None else None
        drawn = curve(points, f"{len(met)} budgets of {kind}", f"{kind} left, %", up, level)
        if path is not None:
            if Path(path).suffix != ".svg":
                raise FxMergeError(f"{path}: a sweep is written as SVG; give a path that ends in .svg")
            write_text(Path(path), drawn)
        return drawn
