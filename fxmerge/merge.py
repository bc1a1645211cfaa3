"""The pipeline, from top to bottom; the stages' names are those of the files, the progress bar and the report.

capture -> provenance -> groups -> allocation -> survey -> selection -> decomposition -> rewrite -> refit -> verify
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from . import verify
from .absorbing import decompose, group_plan
from .allocation import ALLOCATORS, check_patterns, ignored, shaken
from .assembling import assembled
from .calibration import Batches, UnprobedError, fed, summed
from .capture import capture, confined
from .constants import recompute
from .errors import FxMergeError, source_line
from .evidence import Reading
from .fitting import fitted, holds, mismatch
from .groups import aligned, group
from .ir import Capture, Group, Grouping, Provenance, Refusal
from .lockstep import Settings
from .options import Options
from .plan import GroupPlan, Plan
from .progress import progress
from .provenance import provenance
from .refit import Refitted, refit
from .report import Report
from .resizing import Call
from .results import Analysis, Result
from .rewrite import Rewriter, survivors
from .selection import select
from .similarity import candidates, state
from .survey import readings
from .targets import pair


def analyze(
    model: nn.Module | ExportedProgram, example_inputs: Any = None, options: Options | None = None, **changes: Any
) -> Analysis:
    """Find a model's merge groups and refusals; nothing is changed.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; an ExportedProgram has
        its own.
    Raises FxMergeError for a model that cannot be traced or inputs that it does not take.
    """
    options = settled(options, changes)
    captured = capture(model, example_inputs)
    facts, grouping = _grouped(captured, provenance(captured, options.heads == "whole"))
    return Analysis(captured, facts, grouping, grouping.refusals)


def settled(options: Options | None, changes: dict[str, Any]) -> Options:
    if options is not None and not isinstance(options, Options):
        raise FxMergeError(f"options is a {type(options).__name__}; give fxmerge.Options(...) or keyword arguments")
    return (options or Options()).replace(**changes)


def merge(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    options: Options | None = None,
    calibration: Any = None,
    **changes: Any,
) -> Result:
    """Make a trained model structurally smaller; `model` itself is never modified.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; an ExportedProgram has
        its own.
    options: `Options`, or its fields as keyword arguments.
    calibration: batches of unlabelled inputs for refit, in place of probes: an iterable of tensors, tuples or dicts, a
        DataLoader (what the model does not take is ignored), or one tensor.
    Raises FxMergeError where it cannot be done, naming what and what to do instead.
    """
    return _merge(model, example_inputs, settled(options, changes), None, calibration)


def apply(
    plan: Plan, model: nn.Module | ExportedProgram, example_inputs: Any = None, calibration: Any = None
) -> Result:
    """Replay a plan on another copy of the model: the same channels stay, whatever the weights.

    Raises FxMergeError where the model's groups are not the plan's.
    """
    return _merge(model, example_inputs, plan.options, {g.name: g for g in plan.groups}, calibration)


def _merge(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    options: Options,
    decided: Mapping[str, GroupPlan] | None,
    given: Any,
) -> Result:
    if given is not None:
        options = options.replace(refit="calibration")
    if given is None and options.refit == "calibration":
        raise FxMergeError("refit='calibration' needs batches of inputs; give merge(..., calibration=batches)")
    with progress() as stage:
        started = time.perf_counter()
        stage("capture")
        captured = capture(model, example_inputs)
        if captured.blank:
            raise FxMergeError(
                "weights of this model are on the meta device, without values: it can be analysed, and merged once "
                "they are there; fxmerge.on_disk(model, 'weights.safetensors') reads them as they are needed"
            )
        try:
            return _merged(captured, options, decided, given, stage, started)
        except FxMergeError as error:
            if captured.recorded is None:
                raise
            try:  # what the user's own code sees may depend on widths in a way that nobody can mend
                return _merged(confined(captured), options, decided, given, stage, started)
            except FxMergeError:
                raise error from None


def _merged(
    captured: Capture,
    options: Options,
    decided: Mapping[str, GroupPlan] | None,
    given: Any,
    stage: Callable[[str], None],
    started: float,
) -> Result:
    stage("provenance")
    facts = provenance(captured, options.heads == "whole")
    stage("groups")
    facts, grouping = _grouped(captured, facts)
    if decided is None:
        check_patterns(grouping.groups, [n for n, _ in captured.module.named_modules()], options)
    groups, refusals = _in_scope(grouping, options)
    tensors = state(captured.module)
    stage("allocation")
    counts = _replayed(groups, decided) if decided is not None else ALLOCATORS["uniform"](groups, options)
    narrowed = [g for g in groups if sum(counts[g.name]) < g.channels]
    settings = Settings(options.rows, options.seed, options.refit == "synthetic", summed)
    batches, notes = _batches(captured, facts, options, given, settings, stage) if narrowed else ([], ())
    if notes == (_STRAYS,):
        settings = replace(settings, held=False)
    surveyed: Mapping[str, tuple[Reading, ...]] = {}
    if batches and decided is None and options.selection == "repair":
        stage("survey")
        surveyed = readings(captured, facts, narrowed, batches, settings, stage)
    chosen: list[tuple[Group, Tensor]] = []
    for g in narrowed:
        stage(f"selection {g.name}")
        if decided is not None:
            kept = torch.tensor(decided[g.name].kept)
        else:
            seen = candidates(g, tensors, options.seed, surveyed.get(g.name, ()))
            kept = select(options.selection, seen, g.cells, counts[g.name])
        chosen.append((g, kept))
    chosen, edits, refused = _provable(captured, facts, grouping, chosen)
    refusals = (*refusals, *refused)
    rewriter, plans = Rewriter(captured.module, facts), []
    for g, kept in chosen:
        stage(f"decomposition {g.name}")
        mapping, merged = decompose(g, kept, captured, tensors, options)
        rewriter.absorb(merged)
        plans.append(group_plan(g, kept, mapping))
    stage("rewrite")
    alive = survivors(facts, grouping.atom, chosen)
    rewritten = rewriter.finish(alive, edits)
    refitted: tuple[Refitted, ...] = ()
    if batches and chosen:
        stage("refit")
        refitted = refit(pair(captured.module, facts, rewritten, alive), batches, settings, stage)
    module = assembled(captured, rewritten)
    stage("verify")
    verdict = verify.compare(captured, module)
    analysis = Analysis(captured, facts, grouping, refusals)
    plan = Plan(options, tuple(plans))
    told = (grouping.groups, refusals, captured, module, plan, verdict, refitted, notes)
    report = Report(*told, facts=facts, grouping=grouping, seconds=time.perf_counter() - started)
    return Result(module, plan, report, analysis)


def _batches(
    captured: Capture,
    facts: Provenance,
    options: Options,
    given: Any,
    settings: Settings,
    stage: Callable[[str], None],
) -> tuple[Batches, tuple[str, ...]]:
    """What refit runs on, or none and the reason."""
    if options.refit == "none":
        return [], ()
    if captured.recorded is not None:  # its code between the parts cannot run in lockstep: the widths are its own
        return [], ("refit is left out, as only parts of the model could be traced",)
    stage("probes" if given is None else "calibration")
    try:
        batches = fed(captured, facts, options, given, lambda b: mismatch(captured, facts, b, settings))
    except UnprobedError as why:
        return [], (str(why),)
    if given is not None:
        return batches, ()
    if not holds(captured, facts, batches, settings):
        return batches, (_STRAYS,)
    return fitted(captured, facts, batches, settings, stage), ()


_STRAYS = "probes run as they are, since the BatchNorms' running statistics are far from what the layers give"


def _grouped(captured: Capture, facts: Provenance) -> tuple[Provenance, Grouping]:
    """The groups; where blocks are shuffled into each other, with the channels at one place of all blocks as one.

    Whether a graph shuffles is found by trial: blocks lose different places, and the sizes are checked.
    """
    grouping = group(facts)
    while True:
        blocked = [g for g in grouping.groups if g.blocks]
        failures = []
        for number in range(max((len(g.blocks) for g in blocked), default=0)):
            trial = [(g, shaken(g, min(number, len(g.blocks) - 1))) for g in blocked]
            failures += recompute(captured, facts, survivors(facts, grouping.atom, trial))[1]
        guilty = [g for g in blocked for f in failures if _hit(g, grouping, f.labels)]
        if not guilty:
            return facts, grouping
        facts = aligned(facts, grouping, guilty)
        grouping = group(facts)


def _hit(group: Group, grouping: Grouping, labels: Tensor) -> bool:
    return bool(torch.isin(grouping.atom[labels], group.atoms).any())


def _in_scope(grouping: Grouping, options: Options) -> tuple[list[Group], tuple[Refusal, ...]]:
    """The groups that these options let in, and a refusal for each other."""
    inside, out = [], list(grouping.refusals)
    for g in grouping.groups:
        why = ""
        if ignored(g, options):
            why = "is ignored, as the options say"
        elif options.scope == "internal" and not g.internal:
            why = "is not internal: it has several writers, several readers, or a mixer"
        if why:
            out.append(Refusal(g.name, g.channels, why, ""))
        else:
            inside.append(g)
    return inside, tuple(out)


def _replayed(groups: Sequence[Group], decided: Mapping[str, GroupPlan]) -> dict[str, tuple[int, ...]]:
    known = {g.name: g for g in groups}
    counts = {g.name: tuple(torch.bincount(g.cells).tolist()) for g in groups}
    for name, planned in decided.items():
        if name not in known or known[name].channels != planned.channels:
            has = f"has {known[name].channels} channels" if name in known else "is not there"
            raise FxMergeError(f"the plan's group {name} of {planned.channels} channels {has} in this model")
        kept = known[name].cells[list(planned.kept)]
        counts[name] = tuple(torch.bincount(kept, minlength=len(counts[name])).tolist())
        for block in known[name].blocks:
            if len({sum(counts[name][cell] for cell in row) for row in block}) > 1:
                raise FxMergeError(f"the plan keeps unequally many channels of the blocks of {name}")
    return counts


def _provable(
    captured: Capture, facts: Provenance, grouping: Grouping, chosen: list[tuple[Group, Tensor]]
) -> tuple[list[tuple[Group, Tensor]], dict[str, Call], list[Refusal]]:
    """Leave out groups whose narrowing makes a size in the graph wrong that cannot be put right."""
    refused: list[Refusal] = []
    nodes = {n.name: n for n in captured.module.graph.nodes}
    while True:
        edits, failures = recompute(captured, facts, survivors(facts, grouping.atom, chosen))
        if not failures:
            return chosen, edits, refused
        gone: set[str] = set()
        for failure in failures:
            guilty = [g for g, _ in chosen if _hit(g, grouping, failure.labels)]
            guilty = guilty or [g for g, _ in chosen]  # a size that follows a width it should not: decline all
            if gone.isdisjoint(g.name for g in guilty):  # else it may follow from those
                why = f"the sizes at {failure.node} cannot follow"
                refused += [Refusal(g.name, g.channels, why, source_line(nodes[failure.node])) for g in guilty]
                gone |= {g.name for g in guilty}
        chosen = [(g, kept) for g, kept in chosen if g.name not in gone]
