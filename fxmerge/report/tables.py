"""The tables of the reports and the short texts in their cells."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from fxmerge.ir.branches import Measured
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Refusal
from fxmerge.ir.mixtures import Thinned
from fxmerge.refit.records import Refitted
from fxmerge.report.layout import Footnotes, Style, names, numbers, table, wrap
from fxmerge.report.refusals import parameters_held

REFUSED = 20  # reasons in the table of refusals, at most
REFITTED = 40  # layers in the table of refit, at most


def refusal_lines(title: str, refusals: Sequence[Refusal], captured: Capture, width: int, style: Style) -> list[str]:
    """The channels that are not merged, with the reason below each row; those with the most parameters first.

    Layers that have the same reason share a row, and so do reasons that differ in numbers only.
    """
    if not refusals:
        return []
    held = {r: parameters_held(r, captured) for r in refusals}
    alike: dict[str, list[Refusal]] = {}
    for r in sorted(refusals, key=lambda r: -held[r]):
        alike.setdefault(re.sub(r"\d+", "#", r.reason), []).append(r)
    rows = sorted(alike.values(), key=lambda same: -sum(held[r] for r in same))
    shown, rest = rows[:REFUSED], [r for same in rows[REFUSED:] for r in same]
    layers = [list(dict.fromkeys(r.name for r in same)) for same in shown]
    columns = [
        names("layer", [found[0] for found in layers], [len(found) - 1 for found in layers]),
        numbers("channels", [f"{sum(r.channels for r in same):,}" for same in shown]),
        numbers("parameters", [f"{sum(held[r] for r in same):,}" for same in shown]),
    ]
    lines = table(title, columns, width, style, [_reason(same) for same in shown])
    if rest:
        left = f"and {len(rest)} more for other reasons, with {sum(held[r] for r in rest):,} parameters"
        lines += wrap(f"{left}; the JSON report has them all", width, style)
    return lines


def _reason(same: Sequence[Refusal]) -> str:
    """The reason of some refusals with the source line of the first."""
    places = list(dict.fromkeys(r.where for r in same if r.where))
    more = f", and {len(places) - 1} more line{'s' * (len(places) > 2)}" if len(places) > 1 else ""
    return same[0].reason + (f" [{places[0]}{more}]" if places else "")


def refit_lines(refitted: Sequence[Refitted], width: int, style: Style) -> list[str]:
    """The layers that were considered for refit, with the relative square error of their outputs."""
    worst = sorted(refitted, key=lambda r: -r.after if math.isfinite(r.after) else -math.inf)[:REFITTED]
    shown = [r for r in refitted if r in worst] if len(refitted) > REFITTED else list(refitted)
    notes = Footnotes()
    for r in shown:
        notes.add([r.note] if r.note else [])
    columns = [
        names("layer", [r.name for r in shown]),
        numbers("error before", [error(r.before) for r in shown]),
        numbers("error after", [error(r.after) for r in shown]),
        *notes.columns,
    ]
    lines = table("Refit (relative square error of each layer's outputs)", columns, width, style)
    lines += notes.lines(width, style)
    if len(shown) < len(refitted):
        left = f"and {len(refitted) - len(shown)} more with smaller errors; the JSON report has them all"
        lines += wrap(left, width, style)
    return lines


def error(value: float) -> str:
    """A relative error with four decimals, or with one digit if it is smaller."""
    return f"{value:.0e}" if 0 < value < 5e-5 else decimals(value, 4)


def decimals(value: float, count: int) -> str:
    """A number with `count` decimals; `-` if it was not measurable."""
    return f"{value:.{count}f}" if math.isfinite(value) else "-"


def change(before: int | None, after: int | None, compact: bool = False) -> str:
    """`1,024 -> 512`, with `-` for a number that is not known.

    compact: three digits and a unit, as in `1.18M`
    """
    one, other = (("-" if n is None else short(n) if compact else f"{n:,}") for n in (before, after))
    return f"{one} -> {other}"


def short(number: int) -> str:
    """A number with three digits and a unit, such as 1.18M; exact below 10,000."""
    if number < 10_000:
        return f"{number:,}"
    value, unit = float(number), ""
    for larger in "kMGTP":
        value, unit = value / 1000, larger
        if value < 999.5:
            break
    return f"{value:#.3g}".rstrip(".") + unit


def percent(part: float, whole: float) -> str:
    """The share of `part` in `whole`, such as `42.0 %`; `-` if `whole` is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def first_names(names: Sequence[str]) -> str:
    """At most four names, followed by the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def capture_lines(captured: Capture) -> list[str]:
    """Lines on what was dropped whole, on what capture left out of the output, and on declared sizes without use."""
    lines = [_dropped(b) for b in (captured.cut.dropped if captured.cut else ())]
    lines += [_experts(t) for t in (captured.cut.thinned if captured.cut else ())]
    lines += [f"left out of the output: {', '.join(captured.left_out)}"] if captured.left_out else []
    if captured.dynamic_shapes is not None and captured.route != "export":
        lines.append(
            "dynamic_shapes holds for what is exported from the merged model, but not for the module itself: it was "
            "captured without torch.export, and takes what the model takes"
        )
    return lines


def _dropped(branch: Measured) -> str:
    """The line on a dropped branch: what it cost, and what was lost without it."""
    costs = f"{branch.parameters:,} parameters and {branch.flops:,} FLOPs"
    return f"dropped    {branch.name}: {costs}; dropped alone, it changes the outputs by {math.sqrt(branch.loss):.2g}"


def _experts(one: Thinned) -> str:
    """The line on the experts that left a mixture: which, and what was lost without them."""
    left = ", ".join(map(str, one.dropped))
    changes = f"without them alone, what it is added to changes by {math.sqrt(one.loss):.2g}"
    return f"experts    {one.name}: {one.experts} -> {len(one.kept)}, without {left}; {changes}"
