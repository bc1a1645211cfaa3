"""One sentence for who sees a result for the first time: what was done, with which data, and what is lost."""

from __future__ import annotations

from math import isfinite
from typing import Protocol

from fxmerge.graph.compare import Verdict
from fxmerge.graph.cost import Cost
from fxmerge.ir.capture import Capture
from fxmerge.plan import Plan
from fxmerge.refit.handed_out import HandedOut
from fxmerge.report.tables import percent

IN_PERCENT = 10.0  # a larger relative error is told as a factor


class Merged(Protocol):
    """What the sentence about a merge is made from: a `Report`."""

    @property
    def captured(self) -> Capture: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def before(self) -> Cost: ...
    @property
    def after(self) -> Cost: ...
    @property
    def verdict(self) -> Verdict: ...
    @property
    def source(self) -> str: ...
    @property
    def handed_out(self) -> HandedOut | None: ...


def analysed(name: str, groups: int, refusals: int) -> str:
    """The sentence about an analysis, of a model of the class `name`."""
    found = f"{counted(groups, 'group') if groups else 'no group'} of layers that can lose channels together"
    refused = f", and {counted(refusals, 'layer')} whose channels must stay" if refusals else ""
    return f"fxmerge read the graph of {name} and found {found}{refused}; nothing was changed."


def merged(report: Merged) -> str:
    """The sentence about a merge."""
    name, groups, branches = report.captured.name, report.plan.groups, report.plan.branches
    if report.plan.is_empty:
        return f"fxmerge found nothing in {name} to make smaller, and the model is unchanged."
    before, after = report.before, report.after
    dropped = groups and percent(sum(g.channels - len(g.kept) for g in groups), sum(g.channels for g in groups))
    left = f"{percent(after.parameters, before.parameters)} of the parameters"
    left += f" and {percent(after.flops, before.flops)} of the FLOPs" if before.flops else ""
    done = [f"{counted(len(groups), 'group')} of layers dropped {dropped} of their channels"] if groups else []
    done += [f"{counted(len(branches), 'residual branch', 'residual branches')} left"] if branches else []
    gone = sum(len(one.dropped) for one in report.plan.experts)
    done += [f"{counted(gone, 'expert')} left"] if gone else []
    return (
        f"fxmerge made {name} smaller without training: {' and '.join(done)}, {left} remain, {_data(report)}, "
        f"and {_loss(report.verdict)}."
    )


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 group`, `2 groups`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _data(report: Merged) -> str:
    if report.source:
        return f"refit ran on {report.source}"
    if report.handed_out is None:
        return "no data was used (no refit)"
    return f"refit was no closer to the original, so that the model handed out is the one {report.handed_out.name}"


def _loss(verdict: Verdict) -> str:
    if verdict.differing is not None and verdict.differing == verdict.error:  # it returns integers only
        return f"{percent(verdict.differing, 1)} of its outputs on the example inputs differ from the original's"
    if not isfinite(verdict.error):
        return f"how far its outputs are from the original's could not be measured ({verdict.reason})"
    off = percent(verdict.error, 1) if verdict.error <= IN_PERCENT else f"a factor of {verdict.error:.3g}"
    return f"its outputs on the example inputs are off by {off} (relative error)"
