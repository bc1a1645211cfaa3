"""The pipeline of a merge, in the order in which it runs; the progress bar shows the same names of stages.

prepared            capture
Prepared.found      provenance -> groups
Prepared.choose     allocation -> survey -> selection          (Prepared.replay takes them from a plan)
Prepared.apply      decomposition -> rewrite -> refit -> verify
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxmerge import verify
from fxmerge.analysis.grouping import grouped, provable
from fxmerge.analysis.groups import overlaps
from fxmerge.analysis.head_widths import head_widths
from fxmerge.analysis.new_biases import limited
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration.batches import Batches, with_data
from fxmerge.calibration.division import comparing, solving
from fxmerge.calibration.epilogue import against
from fxmerge.calibration.fit_probes import RefitData, refit_data
from fxmerge.calibration.output_error import output_error
from fxmerge.calibration.paired_run import Pair, Settings
from fxmerge.calibration.readings import readings
from fxmerge.calibration.sensitivity import sensitivity
from fxmerge.capture.capture_model import capture, check_weights, confined
from fxmerge.errors import FxMergeError
from fxmerge.graph.cost import flops_by_node
from fxmerge.graph.distributed import summed
from fxmerge.graph.eval_mode import computing
from fxmerge.graph.latency import compared
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal
from fxmerge.ir.provenance import Provenance
from fxmerge.methods.allocation import Counts
from fxmerge.methods.elimination import Orders
from fxmerge.methods.evidence import Reading
from fxmerge.options import Options
from fxmerge.plan import GroupPlan, Plan
from fxmerge.planning.budget import Allotted, allot, original_of
from fxmerge.planning.counts import by_ratio
from fxmerge.planning.draft import Choice, Draft, drafted
from fxmerge.planning.error_curves import errors as losses
from fxmerge.planning.roles import without
from fxmerge.planning.room import Room
from fxmerge.planning.scope import check_patterns, in_scope, replayed
from fxmerge.planning.selecting import Selected, selected, wanted
from fxmerge.planning.statistics import state
from fxmerge.progress import Stage
from fxmerge.refit.contradiction import contradiction
from fxmerge.refit.handed_out import MERGED, PRUNED, HandedOut, closest
from fxmerge.refit.records import Refitted
from fxmerge.report.reports import Report
from fxmerge.result import Analysis, Result
from fxmerge.rewrite.reassemble import assembled
from fxmerge.weights.shards import divided

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@computing()
def prepared(
    model: nn.Module | ExportedProgram, example_inputs: Any, options: Options, given: Any,
    stage: Stage, dynamic_shapes: Any = None,
) -> Prepared:  # fmt: skip
    """A model that is captured, to be merged with these options, or with others that differ only in their budget.

    given: the user's calibration data, or None
    """
    options = with_data(options, given)
    stage("capture")
    captured = capture(model, example_inputs, dynamic_shapes)
    check_weights(captured)
    return Prepared(captured, options, given, stage)


class Prepared:
    """A captured model and all that is computed once for any number of merges; each part is computed on first use."""

    def __init__(
        self, captured: Capture, options: Options, given: Any, stage: Stage, data: RefitData | None = None
    ) -> None:
        self.captured, self.options, self.given, self.stage = captured, options, given, stage
        self.known = data  # of the whole model, if the capture lacks branches of it
        held, memory = options.refit == "synthetic", options.memory
        self.probing = Settings(rows=options.rows, seed=options.seed, held=held, reduce=summed, memory=memory)
        self.seen: dict[int, dict[str, tuple[Reading, ...]]] = {}  # by the identity of the batches
        self.orders, self.tensors = Orders(), state(captured.module)
        self.thinner: dict[Any, tuple[Prepared, tuple[str, ...]]] = {}  # with fewer experts (see `experts.py`)

    @cached_property
    def found(self) -> tuple[Provenance, Grouping]:
        """The provenance of every channel, and the merge groups."""
        self.stage("provenance")
        facts = provenance(self.captured, self.options.heads != "width")
        facts = limited(self.captured, facts, self.options)
        self.stage("groups")
        return grouped(self.captured, facts, self.options.heads)

    @property
    def original(self) -> nn.Module:
        """The original model."""
        return original_of(self.captured)

    @cached_property
    def flops(self) -> Mapping[str, int]:
        """The FLOPs of each node of the original."""
        return flops_by_node(self.captured.module, self.captured.inputs)

    @cached_property
    def data(self) -> RefitData:
        """What refit runs on."""
        return self.known or refit_data(
            self.captured, self.found[0], self.options, given=self.given, settings=self.probing, stage=self.stage
        )

    @property
    def settings(self) -> Settings:
        """How the batches are run."""
        return replace(self.probing, held=self.data.held, made=self.data.made, padding=self.data.padding)

    def readings(self, groups: Sequence[Group], batches: Batches | None = None) -> Mapping[str, tuple[Reading, ...]]:
        """{group: the second moments at its consumers}, for these at least, on samples of refit's data to solve on."""
        batches = self.data.batches if batches is None else batches
        known = self.seen.setdefault(id(batches), {})
        missing = [g for g in groups if g.name not in known]
        if batches and missing:
            self.stage("survey")
            own = solving(self.captured, batches, self.data.made if batches is self.data.batches else 0)
            known |= readings(self.captured, *self.found, missing, own, self.settings, self.stage)
        return known

    @cached_property
    def sensitive(self) -> Mapping[str, float]:
        """{layer: how much the model's outputs change with an error in its outputs}, for the consumers of groups."""
        groups = in_scope(self.found[1], self.options)[0]
        return sensitivity(self.captured, self.found[0], groups, self.data.batches, self.settings, self.stage)

    @computing()
    def merged(
        self, options: Options, decided: Mapping[str, GroupPlan] | None = None,
        choosing: Callable[[Prepared, Options], Choice] | None = None,
    ) -> Result:  # fmt: skip
        """The model merged with these options, which may differ from those it was prepared with in their budget only.

        decided: a plan's groups by name, to be replayed; choosing: in place of `choose`
        """
        started, choosing = time.perf_counter(), choosing or Prepared.choose

        def run(own: Prepared) -> Result:
            return own.apply(choosing(own, options) if decided is None else own.replay(options, decided), started)

        try:
            return run(self)
        except FxMergeError as error:
            if self.captured.recorded is None:
                raise
            try:  # the user's own code, which runs between the traced parts, may depend on the widths that it sees
                return run(self.confined)
            except FxMergeError:
                raise error from None

    @cached_property
    def confined(self) -> Prepared:
        """The same model with all channels kept that the user's own code sees."""
        return Prepared(confined(self.captured), self.options, self.given, self.stage)

    def choose(self, options: Options) -> Choice:
        """Decides which channels each group keeps: as many as `allocation` says, and those that `selection` chooses."""
        if self.captured.cut is None:
            check_patterns(self.found[1].everything, [n for n, _ in self.captured.module.named_modules()], options)
        groups, refusals = in_scope(self.found[1], options)
        while True:
            allotted = self.allocation(groups, options)
            found = self.selection(groups, allotted.counts, options)
            groups, mates = without(groups, found.refused, options.same_widths)
            refusals = (*refusals, *found.refused, *mates)
            if not mates and not (found.refused and options.budget):  # else the others meet the budget
                break
        batches, notes = self.refitted_on(any(sum(allotted.counts[g.name]) < g.channels for g in groups))
        return self.choice(options, found, refusals, batches, (*notes, *allotted.notes))

    def refitted_on(self, narrows: bool) -> tuple[Batches, tuple[str, ...]]:
        """The batches and the notes on them, if anything changes. narrows: whether any group does"""
        return (self.data.batches, self.data.notes) if narrows or self.captured.cut else ([], ())

    def replay(self, options: Options, decided: Mapping[str, GroupPlan]) -> Choice:
        """Keeps the channels that a plan keeps. Raises FxMergeError if the plan's groups are not the model's."""
        groups, refusals = in_scope(self.found[1], options)
        counts = replayed(groups, decided)
        narrowed = [g for g in groups if sum(counts[g.name]) < g.channels]
        batches, notes = self.refitted_on(bool(narrowed))
        chosen = [(g, torch.tensor(decided[g.name].kept)) for g in narrowed]
        turned = frozenset(name for name, plan in decided.items() if plan.components is not None)
        found = Selected(*provable(self.captured, *self.found, chosen), turned)
        return self.choice(options, found, (*refusals, *found.refused), batches, notes)

    def choice(
        self, options: Options, found: Selected, refusals: Sequence[Refusal], batches: Batches, notes: tuple[str, ...]
    ) -> Choice:
        own = Choice(options=options, chosen=found.chosen, edits=found.edits, refusals=tuple(refusals))
        return replace(own, batches=batches, notes=notes, turned=found.turned)

    def allocation(self, groups: Sequence[Group], options: Options) -> Allotted:
        """How many channels each group keeps, by the ratio or by the budget."""
        self.stage("allocation")
        facts, grouping = self.found
        if not options.budget:
            return Allotted(by_ratio(groups, options, overlaps(grouping), head_widths(facts, grouping)))
        room = Room.before_survey(self.captured, facts, grouping, groups, options, self.flops)
        free, errors = room.free, dict(room.errors)
        batches = self.data.batches if free else []
        if options.allocation != "uniform":
            surveyed = self.readings(free) if batches else {}
            self.stage("curves")
            errors |= losses(
                room, lambda counts: self.selection(free, counts, options), batches, self.settings, readings=surveyed,
                tensors=self.tensors, orders=self.orders, sensitivity=lambda: self.sensitive, stage=self.stage,
            )  # fmt: skip
        room = replace(room, errors=errors, refitted=bool(batches))
        return allot(room, self.tensors, self.stage, lambda counts: self.error(groups, counts, options))

    def selection(self, groups: Sequence[Group], counts: Counts, options: Options) -> Selected:
        """Which channels each group keeps, `counts` of them in each of its cells; edits of sizes, and refusals."""
        narrowed = [g for g in groups if sum(counts[g.name]) < g.channels]
        needed = wanted(narrowed, options)
        surveyed = self.readings(needed) if needed else {}
        known, stage = self.orders, self.stage
        return selected(narrowed, counts, self.captured, *self.found, self.tensors, options, surveyed, known, stage)

    def error(self, groups: Sequence[Group], counts: Counts, options: Options) -> float:
        """The error of the outputs with these channel counts before refit, on samples that the draft was not fitted to.

        On the example inputs if there is no data. 0 for a model that is traced in parts without data: the user's code
        computes its outputs.
        """
        if self.captured.recorded is not None and not self.data.batches:
            return 0.0
        fit, held, judges = self.compared
        self.readings(groups, fit)  # at once, for all that are compared
        draft = self.draft(self.choice(options, self.selection(groups, counts, options), (), fit, ()))
        settings = replace(self.settings, made=0, held=self.settings.held and bool(held))
        return output_error(self.streams(draft), held or [self.captured.inputs], settings, judges)

    @cached_property
    def compared(self) -> tuple[Batches, Batches, list[torch.Tensor] | None]:
        """What drafts are fitted and compared on: see `comparing`."""
        return comparing(self.captured, self.data.batches, self.settings)

    def streams(self, draft: Draft) -> Pair:
        """The original graph and that of a draft."""
        return against(self.captured, self.found[0], draft.graph, draft.alive, draft.original, draft.rotated)

    def apply(self, choice: Choice, started: float) -> Result:
        """Builds the merged model of a choice, refits it, and compares it with the original.

        started: when the merge began, by time.perf_counter
        """
        captured, (facts, grouping), draft = self.captured, self.found, self.draft(choice)
        refitted: tuple[Refitted, ...] = ()
        best: HandedOut | None = None
        if choice.batches and (choice.chosen or captured.cut):
            pruned = replace(choice, options=choice.options.replace(decomposition="prune"))
            others = {MERGED: lambda: self.draft(choice), PRUNED: lambda: self.draft(pruned)}
            streams = self.streams(draft)
            refitted, best = closest(captured, streams, others, choice.batches, self.settings, stage=self.stage)
            draft = others[best.name]() if best.name in others else draft
        module = assembled(captured, draft.graph)
        self.stage("verify")
        verdict = verify.compare(captured, module)
        timing = None
        if "latency" in choice.options.budget and (choice.chosen or captured.cut):
            self.stage("latency")
            timing = compared(self.original, module, captured.args, captured.kwargs)
        dropped, thinned = (captured.cut.dropped, captured.cut.thinned) if captured.cut else ((), ())
        plan = Plan(choice.options, draft.plans, tuple(b.name for b in dropped), thinned)
        notes = (*choice.notes, *contradiction(refitted, verdict.error, len(captured.outputs)))
        report = Report(
            captured=captured, facts=facts, grouping=grouping, refusals=choice.refusals, module=module,
            graph=draft.graph, plan=plan, verdict=verdict, refitted=refitted, handed_out=best, notes=notes,
            source=self.data.source if refitted else "", seconds=time.perf_counter() - started, timing=timing,
        )  # fmt: skip
        analysis = Analysis(captured, facts, grouping, choice.refusals)
        return Result(divided(module, captured.sharding), plan, report, analysis)

    def draft(self, choice: Choice) -> Draft:
        """The merged graph of a choice before refit."""
        auto = choice.options.by_channels.decomposition == "auto"
        read = [g for g, _ in choice.chosen if auto or g.name in choice.turned]
        seen = self.readings(read, choice.batches) if choice.batches and read else {}
        return drafted(choice, self.captured, *self.found, tensors=self.tensors, readings=seen, stage=self.stage)
