"""Finds by trial which groups a user's class cannot take: those that stay whole if there is to be a model of it.

Code such as `b, c, h, w = x.shape; y = self.conv(x).reshape(b, c, -1)` takes the width of one layer for that of
another. No attribute holds that width, and the traced graph does not show where it came from. But the code raises, and
the groups inside the module in which it raised are those to try.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from fxmerge.analysis.grouping import provable
from fxmerge.export.class_fit import Stopped
from fxmerge.export.folded import recomputed
from fxmerge.ir.groups import survivors
from fxmerge.plan import planned
from fxmerge.report.reports import Report
from fxmerge.rewrite.reassemble import assembled
from fxmerge.rewrite.rewriter import Rewriter

TRIALS, COPIED = 24, 4e9  # merges of which the class is tried, at most, and their parameters together
FEW = 4  # kinds of groups in a class of modules of which pairs are tried as well

Taken = Callable[[Report], tuple[bool, Stopped | None]]  # whether a merge's class takes it, or where its code stopped


def left_whole(report: Report, stopped: Stopped | None, taken: Taken) -> tuple[str, ...]:
    """Patterns of groups without which the class takes the merge, or none.

    stopped: where the code of the class raised; None if it ran, and returned something else
    taken:   tries the class; merges are tried with their dropped channels simply cut, since only sizes matter here
    """
    captured = report.captured
    if captured.cut is not None or captured.recorded is not None:
        return ()
    left = min(TRIALS, int(COPIED / max(1, sum(p.numel() for p in captured.module.parameters()))))

    def tried(patterns: Sequence[str]) -> tuple[bool, Stopped | None]:
        nonlocal left
        trial = _without(report, patterns) if left else None
        left -= trial is not None
        return taken(trial) if trial is not None else (False, None)

    held: tuple[str, ...] = ()
    if stopped is None:
        computed = tuple(_of_computed(report))
        kinds = dict.fromkeys(_kind(plan.name) for plan in report.plan.groups)
        some = (choice for size in (1, 2) for choice in itertools.combinations(kinds, size))
        for held in [computed] if computed else some:
            fits, stopped = tried(held)
            if fits:
                return held
        if stopped is None or not computed:
            return ()
    owners, calls = stopped.owners, stopped.calls
    while owners:
        inside = _patterns(report, owners[0], held)
        furthest: tuple[int, tuple[str, ...], tuple[type, ...]] | None = None
        sizes = (1, 2, len(inside)) if len(inside) <= FEW else (1, len(inside))
        choices = dict.fromkeys(c for size in sizes for c in itertools.combinations(inside, size)) if inside else ()
        for choice in choices:
            fits, raised = tried((*held, *choice))
            if fits:
                return _fewest((*held, *choice), lambda fewer: tried(fewer)[0])
            if raised is not None and raised.calls > (furthest[0] if furthest else calls):
                furthest = raised.calls, (*held, *choice), raised.owners
        if furthest is None:
            owners = owners[1:]
        else:
            calls, held, owners = furthest
    return ()


def _fewest(patterns: tuple[str, ...], fits: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """Patterns of which none can be left out."""
    for pattern in patterns:
        fewer = tuple(p for p in patterns if p != pattern)
        if fewer and fits(fewer):
            patterns = fewer
    return patterns


def _patterns(report: Report, owner: type, held: Sequence[str]) -> list[str]:
    """The kinds of narrowed groups that are produced inside modules of a class, as patterns of their names."""
    model = report.captured.model
    assert model is not None
    inside = tuple(path + "." for path, m in model.named_modules(remove_duplicate=False) if type(m) is owner)
    if "." in inside:  # the whole model
        return []
    found = [
        _kind(group.name)
        for group, _ in planned(report.grouping.everything, report.plan)
        if any(f"{producer.layer.module}.".startswith(inside) for producer in group.producers)
    ]
    return [pattern for pattern in dict.fromkeys(found) if pattern not in held]


def _of_computed(report: Report) -> list[str]:
    """The kinds of narrowed groups with tensors that the class computes from others, or with one of these."""
    changed = recomputed(report.captured, report.module.state_dict())
    paths = {*changed, *itertools.chain.from_iterable(changed.values())}
    found = [
        _kind(group.name)
        for group, _ in planned(report.grouping.everything, report.plan)
        for member in (*group.producers, *group.per_channel_params, *group.consumers)
        if not paths.isdisjoint(member.layer.params.values())
    ]
    return list(dict.fromkeys(found))


def _kind(name: str) -> str:
    """A group's name with `*` in place of the numbers of its layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _without(report: Report, patterns: Sequence[str]) -> Report | None:
    """The merge without groups, whose dropped channels are cut; None if no group is left, or if it cannot be made."""
    captured, facts, grouping = report.captured, report.facts, report.grouping
    plans = tuple(plan for plan in report.plan.groups if _kind(plan.name) not in patterns)
    plan = replace(report.plan, groups=plans)
    chosen, edits, _ = provable(captured, facts, grouping, planned(grouping.everything, plan))
    if not chosen:
        return None
    module = Rewriter(captured.module, facts).finish(survivors(grouping, chosen), edits)
    return replace(report, module=assembled(captured, module), graph=module, plan=plan, later=[])
