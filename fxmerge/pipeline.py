"""The pipeline, from top to bottom; the stages' names are those of the files, the progress bar and the report.

capture -> provenance -> groups -> allocation -> survey -> selection -> decomposition -> rewrite -> refit -> verify
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from fxmerge import verify
from fxmerge.analysis.grouping import Chosen, grouped, provable
from fxmerge.analysis.groups import overlaps
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration.epilogue import pair
from fxmerge.calibration.fit_probes import RefitData, refit_data
from fxmerge.calibration.paired_run import Settings
from fxmerge.calibration.readings import readings
from fxmerge.calibration.sensitivity import sensitivity
from fxmerge.capture.capture_model import capture, confined
from fxmerge.errors import FxMergeError
from fxmerge.graph.cost import flops_by_node
from fxmerge.graph.distributed import summed
from fxmerge.graph.latency import compared
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, survivors
from fxmerge.ir.provenance import Provenance
from fxmerge.methods.evidence import Reading
from fxmerge.methods.selection import select
from fxmerge.options import Options
from fxmerge.plan import GroupPlan, Plan
from fxmerge.planning.budget import Allotted, Room, allot, original_of
from fxmerge.planning.counts import by_ratio, rungs
from fxmerge.planning.decompose import decompose, group_plan
from fxmerge.planning.error_curves import curves
from fxmerge.planning.scope import check_patterns, in_scope, replayed
from fxmerge.planning.statistics import candidates, state
from fxmerge.refit.refit_layers import Refitted, refit
from fxmerge.report.reports import Report
from fxmerge.result import Analysis, Result
from fxmerge.rewrite.reassemble import assembled
from fxmerge.rewrite.rewriter import Rewriter


def prepared(
    model: nn.Module | ExportedProgram, example_inputs: Any, options: Options, given: Any, stage: Callable[[str], None]
) -> Prepared:
    """A model, ready to be merged by these options, or by ones that differ in their budget only."""
    if given is not None:
        options = options.replace(refit="calibration")
    if given is None and options.refit == "calibration":
        raise FxMergeError("refit='calibration' needs batches of inputs; give merge(..., calibration=batches)")
    stage("capture")
    captured = capture(model, example_inputs)
    if captured.blank:
        raise FxMergeError(
            "weights of this model are on the meta device, without values: it can be analysed, and merged once "
            "they are there; fxmerge.on_disk(model, 'weights.safetensors') reads them as they are needed"
        )
    return Prepared(captured, options, given, stage)


class Prepared:
    """What is found out once, however often a model is merged: each stage when it is first asked for."""

    def __init__(self, captured: Capture, options: Options, given: Any, stage: Callable[[str], None]) -> None:
        self.captured, self.options, self.given, self.stage = captured, options, given, stage
        self.probing = Settings(rows=options.rows, seed=options.seed, held=options.refit == "synthetic", reduce=summed)
        self.tensors = state(captured.module)
        self.seen: dict[str, tuple[Reading, ...]] = {}

    @cached_property
    def found(self) -> tuple[Provenance, Grouping]:
        self.stage("provenance")
        facts = provenance(self.captured, self.options.heads != "width")
        self.stage("groups")
        return grouped(self.captured, facts, self.options.heads)

    @property
    def original(self) -> nn.Module:
        """The model as it was captured."""
        return original_of(self.captured)

    @cached_property
    def flops(self) -> Mapping[str, int]:
        return flops_by_node(self.captured.module, self.captured.inputs)

    @cached_property
    def data(self) -> RefitData:
        """What refit runs on."""
        facts = self.found[0]
        return refit_data(self.captured, facts, self.options, given=self.given, settings=self.probing, stage=self.stage)

    @property
    def settings(self) -> Settings:
        """How the batches are run."""
        return replace(self.probing, held=self.data.held)

    def readings(self, groups: Sequence[Group]) -> Mapping[str, tuple[Reading, ...]]:
        """What the consumers of these groups see of them on the batches."""
        missing = [g for g in groups if g.name not in self.seen]
        if self.data.batches and missing:
            self.stage("survey")
            facts = self.found[0]
            self.seen |= readings(self.captured, facts, missing, self.data.batches, self.settings, self.stage)
        return self.seen

    @cached_property
    def sensitive(self) -> Mapping[str, float]:
        """How much the outputs move with an error of each layer that reads a group."""
        facts, grouping = self.found
        groups = in_scope(grouping, self.options)[0]
        return sensitivity(self.captured, facts, groups, self.data.batches, self.settings, self.stage)

    def merged(self, options: Options, decided: Mapping[str, GroupPlan] | None = None) -> Result:
        """Merge as these options say, which differ from the ones that this was prepared with in their budget only."""
        started = time.perf_counter()
        try:
            return self._merged(options, decided, started)
        except FxMergeError as error:
            if self.captured.recorded is None:
                raise
            try:  # what the user's own code sees may depend on widths in a way that nobody can mend
                return self.confined._merged(options, decided, started)
            except FxMergeError:
                raise error from None

    @cached_property
    def confined(self) -> Prepared:
        return Prepared(confined(self.captured), self.options, self.given, self.stage)

    def _merged(self, options: Options, decided: Mapping[str, GroupPlan] | None, started: float) -> Result:
        captured, stage, tensors = self.captured, self.stage, self.tensors
        facts, grouping = self.found
        if decided is None:
            check_patterns(grouping.everything, [n for n, _ in captured.module.named_modules()], options)
        groups, refusals = in_scope(grouping, options)
        while True:
            stage("allocation")
            if decided is not None:
                allotted = Allotted(replayed(groups, decided))
            elif options.budget:
                allotted = self._allotted(groups, options)
            else:
                allotted = Allotted(by_ratio(groups, options, overlaps(grouping)))
            counts = allotted.counts
            narrowed = [g for g in groups if sum(counts[g.name]) < g.channels]
            batches, notes = (self.data.batches, self.data.notes) if narrowed else ([], ())
            surveyed: Mapping[str, tuple[Reading, ...]] = {}
            if batches and decided is None and options.selection == "repair":
                surveyed = self.readings(narrowed)
            chosen: Chosen = []
            for g in narrowed:
                stage(f"selection {g.name}")
                if decided is not None:
                    kept = torch.tensor(decided[g.name].kept)
                else:
                    seen = candidates(g, tensors, options.seed, surveyed.get(g.name, ()))
                    kept = select(options.selection, seen, g.cells, counts[g.name])
                chosen.append((g, kept))
            chosen, edits, refused = provable(captured, facts, grouping, chosen)
            refusals = (*refusals, *refused)
            if not refused or not options.budget or decided is not None:
                break
            groups = [g for g in groups if g.name not in {r.name for r in refused}]  # the others make good for them
        rewriter, plans = Rewriter(captured.module, facts), []
        for g, kept in chosen:
            stage(f"decomposition {g.name}")
            mapping, merged = decompose(g, kept, captured, tensors, options)
            rewriter.absorb(merged)
            plans.append(group_plan(g, kept, mapping))
        stage("rewrite")
        alive = survivors(grouping, chosen)
        rewritten = rewriter.finish(alive, edits)
        refitted: tuple[Refitted, ...] = ()
        if batches and chosen:
            stage("refit")
            refitted = refit(pair(captured.module, facts, rewritten, alive), batches, self.settings, stage)
        module = assembled(captured, rewritten)
        stage("verify")
        verdict = verify.compare(captured, module)
        timing = None
        if "latency" in options.budget and chosen:
            stage("latency")
            timing = compared(self.original, module, captured.args, captured.kwargs)
        analysis = Analysis(captured, facts, grouping, refusals)
        plan = Plan(options, tuple(plans))
        told = (grouping.everything, refusals, captured, module, plan, verdict, refitted, (*notes, *allotted.notes))
        seconds = time.perf_counter() - started
        report = Report(*told, facts=facts, grouping=grouping, seconds=seconds, timing=timing)
        return Result(module, plan, report, analysis)

    def _allotted(self, groups: Sequence[Group], options: Options) -> Allotted:
        """What a budget leaves each group, by what each would lose."""
        facts, grouping = self.found
        ladders = {g.name: rungs(g, options) for g in groups}
        free = [g for g in groups if len(ladders[g.name]) > 1]
        errors = {name: np.zeros(len(kept)) for name, kept in ladders.items()}
        batches = self.data.batches if free else []
        if options.allocation != "uniform":
            surveyed = self.readings(free) if batches else {}
            self.stage("curves")
            known = (self.captured, facts, free, ladders, surveyed, self.tensors, options, bool(batches))
            errors |= curves(*known, self.sensitive if batches else {})
        room = Room(self.captured, facts, grouping, groups, ladders, errors, options, bool(batches), self.flops)
        return allot(room, self.tensors, self.stage)
