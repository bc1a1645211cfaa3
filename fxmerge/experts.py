"""Merges of models whose mixtures of experts lose whole experts first, if the options ask for it.

The experts leave before anything is merged, together with their row of the router. Everything after that runs on the
graph of the model without them; the targets of refit, and all errors in the report, are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import floor
from typing import Any

from fxmerge.analysis.mixtures import mixtures
from fxmerge.calibration.expert_losses import losses, thinned, unlike
from fxmerge.calibration.paired_run import Settings
from fxmerge.errors import FxMergeError, first_line
from fxmerge.ir.capture import Capture
from fxmerge.ir.mixtures import Mixture, Thinned
from fxmerge.options import Options
from fxmerge.pipeline import Prepared
from fxmerge.planning.counted import flops_within, parameters_within
from fxmerge.planning.scope import check_patterns, matched
from fxmerge.report.tables import first_names
from fxmerge.rewrite.experts import without_experts

Thin = tuple[Prepared, tuple[str, ...]]


def with_share(ready: Prepared, options: Options) -> Thin:
    """(the model with the share of experts that the options ask for, notes for the report)."""
    if options.experts == 1:
        return ready, ()
    key = (options.experts, options.ignore, options.of)
    if key not in ready.thinner:
        ready.thinner[key] = _with_share(ready, options)
    return ready.thinner[key]


def _with_share(ready: Prepared, options: Options) -> Thin:
    check_patterns(ready.found[1].everything, [n for n, _ in ready.captured.module.named_modules()], options)
    found, closed = mixtures(ready.captured, ready.found[0])
    notes = [f"experts: {one.name} keeps all: {one.reason}" for one in closed]
    if not found and not closed:
        notes.append("experts: no expert was dropped: its graph has no products with stacked experts")
    counts = {}
    for one in found:
        each = one.experts // one.groups
        count = max(one.least, floor(each * options.experts + 0.5))
        if matched([one.name, *one.layers], options.ignore):
            continue
        if count < each:
            counts[one.name] = count
        else:
            notes.append(f"experts: {one.name} keeps all: the router chooses among no fewer than {one.experts}")
    some = [one for one in found if one.name in counts]
    if not some:
        return ready, tuple(notes)
    batches, settings = measured_on(ready)
    decided = thinned(
        ready.captured, ready.found[0], counts, some, batches, settings, flops=ready.flops, stage=ready.stage
    )
    pairs = list(zip(some, decided, strict=True))
    try:
        fewer = _without(ready, pairs, options)
    except Exception as error:  # an op refuses the sizes that it gets without the experts
        notes.append(f"experts: no expert was dropped: the graph without them fails ({first_line(error)})")
        return ready, tuple(notes)
    wrong = unlike(ready.captured, fewer.captured, ready.found[0], pairs, replace(settings, held=False))
    if wrong:
        notes += [
            f"experts: {name} keeps all: without some of them, its graph computes something else" for name in wrong
        ]
        pairs = [(one, thin) for one, thin in pairs if one.name not in wrong]
        fewer = _without(ready, pairs, options) if pairs else ready
    return fewer, tuple(notes)


def measured_on(ready: Prepared) -> tuple[Sequence[Sequence[Any]], Settings]:
    """The samples on which losses of whole parts are measured: refit's, or the example, on which no stream is held."""
    if ready.data.batches:
        return ready.data.batches, ready.settings
    return [ready.captured.inputs], replace(ready.settings, held=False)


def as_planned(ready: Prepared, decided: Sequence[Thinned], options: Options) -> Prepared:
    """The model with the experts that a plan keeps. Raises FxMergeError if its mixtures are not those of the plan."""
    if not decided:
        return ready
    found, closed = mixtures(ready.captured, ready.found[0])
    known, reasons = {one.name: one for one in found}, {one.name: one.reason for one in closed}
    for one in decided:
        if one.name not in known:
            has = f"the model's mixtures are {first_names(list(known))}" if known else "the model has none"
            raise FxMergeError(f"the plan drops experts of {one.name}: {reasons.get(one.name, has)}")
        mixture = known[one.name]
        each = [sum(k * mixture.groups // mixture.experts == g for k in one.kept) for g in range(mixture.groups)]
        if mixture.experts != one.experts or len(set(each)) != 1 or each[0] < mixture.least:
            raise FxMergeError(
                f"the plan keeps {len(one.kept)} of {one.experts} experts of {one.name}, which has {mixture.experts}; "
                f"its router needs {mixture.least} of each of {mixture.groups} groups"
            )
    some, kept = [known[one.name] for one in decided], {one.name: one.kept for one in decided}
    batches, settings = measured_on(ready)
    again = losses(ready.captured, ready.found[0], some, kept, batches, settings, ready.flops)
    return _without(ready, list(zip(some, again, strict=True)), options)


def _without(ready: Prepared, decided: Sequence[tuple[Mixture, Thinned]], options: Options) -> Prepared:
    """The model without the experts that leave, to be merged towards the whole one."""
    captured = without_experts(ready.captured, ready.found[0], decided)
    fewer = Prepared(captured, ready.options, ready.given, ready.stage, ready.data)
    left = {**_left(ready, fewer, options.of), "cache": 1.0}
    assert captured.cut is not None
    fewer.captured = replace(captured, cut=replace(captured.cut, left=left))
    return fewer


def _left(whole: Prepared, fewer: Prepared, of: Sequence[str]) -> dict[str, float]:
    """{kind of budget: the share of the cost that is left}."""

    def costs(ready: Prepared) -> dict[str, int]:
        captured: Capture = ready.captured
        return {
            "params": sum(parameters_within(captured.module, of).values()),
            "flops": sum(flops_within(captured, ready.flops, of).values()),
        }

    before, after = costs(whole), costs(fewer)
    return {kind: after[kind] / max(before[kind], 1) for kind in before}
