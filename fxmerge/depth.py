"""Merges that also drop whole residual branches, if the options ask for it.

Branches are tried in the order of their loss per cost. For each number of them, the rest of the budget is shared out
among the groups of the model without these branches. The number whose merged model is closest to the original, after a
short refit and on samples that were held out, is merged; none is always among them. The targets of refit, and all
errors in the report, are those of the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite

from fxmerge.analysis.branches import branches
from fxmerge.calibration.branch_losses import measured
from fxmerge.calibration.division import for_trials
from fxmerge.class_choice import for_class
from fxmerge.errors import FxMergeError
from fxmerge.experts import as_planned, measured_on, with_share
from fxmerge.graph.cost import parameters
from fxmerge.graph.eval_mode import computing
from fxmerge.ir.branches import Branch, Measured
from fxmerge.options import Options
from fxmerge.pipeline import Prepared
from fxmerge.plan import Plan
from fxmerge.planning.depth import droppable, in_order, searched
from fxmerge.planning.draft import Choice
from fxmerge.planning.scope import check_patterns
from fxmerge.refit.trials import trial_error
from fxmerge.report.tables import first_names
from fxmerge.result import Result
from fxmerge.rewrite.branches import without_branches


@computing()
def merged(ready: Prepared, options: Options, plan: Plan | None = None) -> Result:
    """The model merged with these options, which may differ from those it was prepared with in their budget only.

    plan: to be replayed. Raises FxMergeError where its groups or branches are not those of the model
    """
    if plan is not None:
        ready, decided = as_planned(ready, plan.experts, options), {g.name: g for g in plan.groups}
        return (_without(ready, _named(ready, plan.branches)) if plan.branches else ready).merged(options, decided)
    if not options.depth:
        ready, notes = with_share(ready, options)
        return _noted(ready.merged(options, choosing=for_class if options.own_class else None), *notes)
    started = time.perf_counter()
    ((kind, share),) = options.budget.items()
    check_patterns(ready.found[1].everything, [n for n, _ in ready.captured.module.named_modules()], options)
    found, why = branches(ready.captured, ready.found[0])
    free = droppable(found, ready.found[1].everything, options) if share < 1 else []
    if not free:
        why = why or ("all residual branches match a pattern of ignore or keep" if share < 1 else "")
        return _noted(ready.merged(options), f"depth: no branch was dropped: {why}") if why else ready.merged(options)
    whole = parameters(ready.captured.module) if kind == "params" else sum(ready.flops.values())
    order = in_order(_measured(ready, free), kind, whole, share)
    if not order:
        why = f"each costs more than a budget of {share:.1%} removes"
        return _noted(ready.merged(options), f"depth: no branch was dropped: {why}")
    return _Trials(ready, options, order).best(started)


class _Trials:
    """Merges with different numbers of dropped branches, without the final refit."""

    def __init__(self, ready: Prepared, options: Options, order: Sequence[Measured]) -> None:
        self.ready, self.options, self.order = ready, options, order
        self.least, self.chosen = inf, dict[int, tuple[Prepared, Choice]]()  # the best one until now, by its number
        self.failed: FxMergeError | None = None

    def best(self, started: float) -> Result:
        """The merged model with the number of branches that loses least. Raises FxMergeError if none is possible."""
        errors = searched(self.error, len(self.order))
        if not self.chosen:
            assert self.failed is not None
            raise self.failed
        ((number, (ready, choice)),) = self.chosen.items()
        known = ", ".join(f"{n}: {error:.2g}" for n, error in sorted(errors.items()) if isfinite(error))
        text = f"depth: {number} of the {len(self.order)} branches that the budget has room for were dropped"
        note = f"{text}; the relative square error of the outputs in trials, by the number dropped, is {known}"
        return ready.apply(replace(choice, notes=(*choice.notes, note)), started)

    def error(self, number: int) -> float:
        """The error of the outputs with the first branches dropped; infinite if the budget cannot be met."""
        self.ready.stage(f"branches dropped: {number}")
        ready = _without(self.ready, self.order[:number]) if number else self.ready
        try:
            choice = ready.choose(self.options)
            error = _judged(ready, choice)
        except FxMergeError as failed:
            self.failed = self.failed or failed
            return inf
        if error < self.least or not self.chosen:
            self.least, self.chosen = error, {number: (ready, choice)}
        return error


def _judged(ready: Prepared, choice: Choice) -> float:
    """The error of a choice on samples that it was not fitted to, after a short refit if that lowers it."""
    fit, held = for_trials(ready.captured, ready.data.batches[: ready.data.made or None])
    streams = ready.streams(ready.draft(replace(choice, batches=fit)))
    settings = ready.settings if held else replace(ready.settings, held=False)
    batches = fit if choice.batches else []
    return trial_error(streams, batches, held or [ready.captured.inputs], settings, ready.stage)


def _measured(ready: Prepared, found: Sequence[Branch]) -> tuple[Measured, ...]:
    """The branches with their costs and losses, on some of refit's data, or on the example inputs if there is none."""
    batches, settings = measured_on(ready)
    return measured(
        ready.captured, ready.found[0], found, batches, settings,
        flops=ready.flops, means=ready.options.new_biases, stage=ready.stage,
    )  # fmt: skip


def _named(ready: Prepared, names: Sequence[str]) -> tuple[Measured, ...]:
    """The branches with these names. Raises FxMergeError if the model has no branch with one of them."""
    found, why = branches(ready.captured, ready.found[0])
    known = {branch.name: branch for branch in found}
    for name in names:
        if name not in known:
            has = f"the model's branches are {first_names(list(known))}" if known else why
            raise FxMergeError(f"the plan drops the branch {name}, which does not exist in this model: {has}")
    chosen = [known[name] for name in names]
    for number, branch in enumerate(chosen):
        for other in chosen[:number]:
            if branch.overlaps(other):
                raise FxMergeError(f"the plan drops {other.name} and {branch.name}; only one of them can be dropped")
    return _measured(ready, chosen)


def _without(ready: Prepared, dropped: Sequence[Measured]) -> Prepared:
    """The model without these branches, to be merged towards the whole one."""
    captured = without_branches(ready.captured, ready.found[0], dropped, ready.flops)
    return Prepared(captured, ready.options, ready.given, ready.stage, ready.data)


def _noted(result: Result, *notes: str) -> Result:
    """The result with notes in its report."""
    return replace(result, report=replace(result.report, notes=(*result.report.notes, *notes))) if notes else result
