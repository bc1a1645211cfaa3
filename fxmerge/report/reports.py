"""The report of a merge, as tables and as JSON; `drawable.py` adds the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx, nn

from fxmerge.graph.compare import Verdict
from fxmerge.graph.cost import Cost, call_cost, cost
from fxmerge.graph.latency import Timing
from fxmerge.graph.nested import finite
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal, survivors
from fxmerge.ir.provenance import Provenance
from fxmerge.plan import GroupPlan, Plan, fields, json_text, planned
from fxmerge.planning.decompose import unmerged
from fxmerge.planning.statistics import state
from fxmerge.refit.handed_out import HandedOut
from fxmerge.refit.records import Refitted
from fxmerge.report.analysis_report import VERSION
from fxmerge.report.budget_line import Spent, spent
from fxmerge.report.drawable import Drawable
from fxmerge.report.group_data import (
    branches_json,
    cost_json,
    experts_json,
    group_json,
    original_cost,
    plan_json,
    producer_cost,
    refusals_json,
)
from fxmerge.report.headline import merged
from fxmerge.report.layout import WIDTH, Footnotes, Style, joined, names, numbers, table, wrap
from fxmerge.report.notices import notices
from fxmerge.report.operations import operation
from fxmerge.report.tables import (
    capture_lines,
    change,
    decimals,
    first_names,
    percent,
    refit_lines,
    refusal_lines,
)

SIMILARITY = "similarity: how alike dropped channels and what replaces them are, on average (1: equal, 0: unrelated)"


@dataclass(frozen=True, kw_only=True)
class Report(Drawable):
    """The outcome of a merge: each group's channels before and after, the cost, the error, and what was not merged."""

    captured: Capture
    facts: Provenance
    grouping: Grouping
    refusals: tuple[Refusal, ...]
    module: nn.Module  # the merged model
    graph: fx.GraphModule  # its graph; the module itself, unless the model was recorded
    plan: Plan
    verdict: Verdict
    refitted: tuple[Refitted, ...] = ()
    source: str = ""  # what refit ran on
    handed_out: HandedOut | None = None  # which candidate was closest to the original, if there was refit
    notes: tuple[str, ...] = ()  # requests that were not, or not fully, carried out
    later: list[str] = field(default_factory=list)  # notes on what was asked for after the merge
    seconds: float  # duration of the merge
    timing: Timing | None = None  # of the merged model, if a latency budget was given

    def __post_init__(self) -> None:
        _ = self.notices  # now, since the user may put the model in another mode later

    def __repr__(self) -> str:
        groups = f"{len(self.plan.groups)} of {len(self.groups)} groups merged"
        return f"<Report of {self.captured.name}: {groups}; .text() shows them>"

    @cached_property
    def notices(self) -> tuple[str, ...]:
        """What the user may not have meant: random weights, training mode, a ratio below one channel."""
        return notices(self.captured, self.grouping, self.refusals, self.plan)

    @cached_property
    def before(self) -> Cost:
        """Parameters and FLOPs of the original model, counted on first access."""
        return original_cost(self.captured)

    @cached_property
    def after(self) -> Cost:
        """Parameters and FLOPs of the merged model, counted on first access."""
        if self.captured.recorded is None:
            return cost(self.graph, self.captured.inputs)
        return call_cost(self.module, self.captured.args, self.captured.kwargs, self.graph, self.captured.inputs)

    @property
    def spent(self) -> Spent | None:
        """The budget and its outcome; None without a budget."""
        return spent(self)

    def _costs(self) -> tuple[Cost, ...]:
        return (self.before, self.after)

    def _outcome(self) -> tuple[Sequence[Refitted], dict[str, float | str]]:
        told = {"sentence": merged(self), "reason": self.verdict.reason}
        return self.refitted, {"error": self.verdict.error, **told}

    def text(self, width: int = 120, ascii: bool = False) -> str:
        """The merged groups, refit, what was not merged and why, and the totals, as plain text.

        width: of the longest line, at least 20; columns that do not fit are left out
        ascii: use ASCII characters only
        """
        style, width = Style(ascii), max(width, WIDTH)
        refitted = refit_lines(self.refitted, width, style) if self.refitted else []
        refused = refusal_lines("Not merged", self.refusals, self.captured, width, style)
        return joined([self._merged(width, style), refitted, refused], self._totals(), width, style)

    def _merged(self, width: int, style: Style) -> list[str]:
        """The table of merged groups; parameters and FLOPs are those of their producers."""
        plans = {g.name: g for g in self.plan.groups}
        groups = [g for g in self.groups if g.name in plans]
        if not groups:
            kinds = (("residual branches", self.plan.branches), ("experts", self.plan.experts))
            gone = " and ".join(name for name, some in kinds if some)
            whole = f"; it lost whole {gone}, named below" if gone else ""
            return wrap(f"No group of {self.captured.name} was merged{whole}", width, style)
        costs = [(producer_cost(g, self.before), producer_cost(g, self.after)) for g in groups]
        notes = Footnotes()
        for g in groups:
            notes.add(self._notes(g, plans[g.name]))
        columns = [
            names("group", [g.name for g in groups]),
            numbers("channels", [change(plans[g.name].channels, len(plans[g.name].kept)) for g in groups]),
        ]
        for header, at in (("parameters", 0), ("FLOPs", 1)):
            exact, compact = ([change(one[at], two[at], few) for one, two in costs] for few in (False, True))
            columns.append(numbers(header, exact, compact))
        if explained := self.plan.options.decomposition != "prune":
            columns.append(numbers("similarity", [decimals(plans[g.name].similarity, 2) for g in groups]))
        if self.plan.options.decomposition == "mostsim":
            carried = {g.name for g in groups if not unmerged(g, self._tensors, self.plan.options)}
            alone = [sum(p.into < 0 for p in plans[g.name].partners) if g.name in carried else 0 for g in groups]
            columns.append(numbers("no partner", [f"{n:,}" for n in alone]))
        found = table(f"Merged groups of {self.captured.name}", [*columns, *notes.columns], width, style)
        return found + notes.lines(width, style) + (wrap(SIMILARITY, width, style, 4) if explained else [])

    def _notes(self, group: Group, plan: GroupPlan) -> list[str]:
        decomposition, notes = self.plan.options.decomposition, []
        staying = self._in_kept_blocks(group, plan)
        if staying < len(plan.kept):
            notes.append(f"kept channels in blocks that remain: {staying}")
        if plan.components is not None:
            notes.append("kept as principal components of what its consumers read, not as single channels")
            return notes
        if decomposition == "pca":
            notes.append(f"merged as by auto, because a rotation does not pass: {group.nonlinear}")
        if decomposition == "mostsim" and group.scale_blocks:
            notes.append(f"merged without rescaling, because scaling does not pass through {self._ops(group)}")
        if why := unmerged(group, self._tensors, self.plan.options.by_channels):
            notes.append(f"dropped without merging: {why}")
        return notes

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return state(self.captured.module)

    def _ops(self, group: Group) -> str:
        """The operations that scaling does not pass through."""
        nodes = {n.name: n for n in self.captured.module.graph.nodes}
        found = (operation(nodes[name], self.captured.module) for name in group.scale_blocks)
        return first_names(list(dict.fromkeys(found)))

    def _in_kept_blocks(self, group: Group, plan: GroupPlan) -> int:
        """How many of a group's kept channels are in blocks that are not removed as a whole (heads="both")."""
        if self._in_kept_block is None or all(g.name != group.name for g in self.grouping.groups):
            return len(plan.kept)
        return int(self._in_kept_block[group.atoms[list(plan.kept)]].sum())

    @cached_property
    def _in_kept_block(self) -> torch.Tensor | None:
        """(atoms,) whether any label of the atom is in a block that is kept; None if no whole blocks are removed."""
        if (wholes := self.grouping.wholes) is None:
            return None
        alive = survivors(wholes, planned(wholes.groups, self.plan))
        kept = torch.zeros(int(self.grouping.atom.max()) + 1, dtype=torch.bool)
        kept[self.grouping.atom[alive]] = True
        return kept

    def _totals(self) -> list[str]:
        before, after = self.before, self.after
        size = percent(after.parameters, before.parameters)
        return [
            f"parameters {before.parameters:,} -> {after.parameters:,} ({size} left)",
            f"FLOPs      {before.flops:,} -> {after.flops:,} ({percent(after.flops, before.flops)} left)",
            f"relative error of the outputs on the example inputs: {self.verdict.text()}",
            *([self.spent.line()] if self.spent else []),
            *([f"refit ran on {self.source}"] if self.source else []),
            *([line] if self.handed_out and (line := self.handed_out.line()) else []),
            *self.notices,
            *self.notes,
            *self.later,
            *capture_lines(self.captured),
        ]

    def json(self) -> str:
        """JSON text: parameters_before, parameters_after, flops_before, flops_after, error, refit, groups, refusals.

        Its schema is fxmerge/assets/report.schema.json. An error that was not measured, or is not finite, is written
        as null, with "error_reason".
        """
        plans = {g.name: g for g in self.plan.groups}
        groups = []
        for g in self.groups:
            groups.append(
                {
                    **group_json(g),
                    **cost_json(g, self.before, "_before"),
                    **cost_json(g, self.after, "_after"),
                    **plan_json(plans.get(g.name), g),
                }
            )
        return json_text(
            {
                "fxmerge_report": VERSION,
                "model": self.captured.name,
                "parameters_before": self.before.parameters,
                "parameters_after": self.after.parameters,
                "flops_before": self.before.flops,
                "flops_after": self.after.flops,
                "error": finite(self.verdict.error),
                **({"error_reason": self.verdict.reason} if self.verdict.reason else {}),
                **({"error_of_integers": self.verdict.differing} if self.verdict.differing is not None else {}),
                "refit": [finite(vars(r)) for r in self.refitted],
                **({"refit_data": self.source} if self.source else {}),
                **({"handed_out": finite(vars(self.handed_out))} if self.handed_out else {}),
                **({"budget": finite(vars(self.spent))} if self.spent else {}),
                **({"branches": branches_json(self.captured)} if self.plan.branches else {}),
                **({"experts": experts_json(self.captured)} if self.plan.experts else {}),
                "notes": [*self.notices, *self.notes, *self.later],
                "groups": groups,
                "refusals": refusals_json(self.refusals, self.captured),
            },
            convert=lambda record: finite(fields(record)),
        )
