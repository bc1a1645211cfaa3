"""The reports of an analysis and of a merge, as tables and as JSON; `drawable.py` adds the pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxmerge.graph.compare import Verdict
from fxmerge.graph.cost import Cost, call_cost, cost
from fxmerge.graph.latency import Timing
from fxmerge.graph.nested import finite
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal, survivors
from fxmerge.ir.provenance import Provenance
from fxmerge.plan import GroupPlan, Plan, json_text, planned
from fxmerge.planning.decompose import unmerged
from fxmerge.planning.statistics import state
from fxmerge.refit.refit_layers import Refitted
from fxmerge.report.budget_line import Spent, spent
from fxmerge.report.drawable import Drawable
from fxmerge.report.refusals import parameters_held
from fxmerge.report.tables import (
    add_number_columns,
    add_text_columns,
    first_names,
    left_out_line,
    new_table,
    percent,
    refit_table,
    refusal_table,
    render,
)

VERSION = 2  # of the schema of the JSON


@dataclass(frozen=True, kw_only=True)
class AnalysisReport(Drawable):
    """The merge groups of a model, and the channels that cannot be merged."""

    captured: Capture
    facts: Provenance = field(repr=False)
    grouping: Grouping = field(repr=False)
    refusals: tuple[Refusal, ...]
    plan: None = None

    @cached_property
    def cost(self) -> Cost:
        """Parameters and FLOPs of the model."""
        return original_cost(self.captured)

    def _costs(self) -> tuple[Cost, ...]:
        return (self.cost,)

    def text(self, width: int = 120) -> str:
        """Two tables, the groups with their members and the refusals with their reasons, then the totals."""
        table = new_table("Merge groups", "group")
        add_number_columns(table, "channels")
        add_text_columns(table, "producers", "per-channel parameters", "consumers")
        for g in self.groups:
            table.add_row(g.name, str(g.channels), *map(first_names, _members(g).values()))
        refused = [refusal_table(self.refusals, self.captured)] if self.refusals else []
        total = f"{len(self.groups)} groups, {self.cost.parameters:,} parameters, {self.cost.flops:,} FLOPs"
        return render(table, *refused, total + left_out_line(self.captured), width=width)

    def json(self) -> str:
        """JSON text with the groups, refusals, parameters and FLOPs. Schema: fxmerge/assets/report.schema.json."""
        return json.dumps(
            {
                "fxmerge_report": VERSION,
                "parameters": self.cost.parameters,
                "flops": self.cost.flops,
                "groups": [_group_json(g) for g in self.groups],
                "refusals": _refusals_json(self.refusals, self.captured),
            },
            indent=1,
        )


@dataclass(frozen=True, kw_only=True)
class Report(Drawable):
    """The outcome of a merge: each group's channels before and after, the cost, the error, and what was not merged."""

    captured: Capture
    facts: Provenance = field(repr=False)
    grouping: Grouping = field(repr=False)
    refusals: tuple[Refusal, ...]
    module: nn.Module  # the merged model
    plan: Plan
    verdict: Verdict
    refitted: tuple[Refitted, ...] = ()
    notes: tuple[str, ...] = ()  # requests that were not, or not fully, carried out
    seconds: float  # duration of the merge
    timing: Timing | None = None  # of the merged model, if a latency budget was given

    @cached_property
    def before(self) -> Cost:
        """Parameters and FLOPs of the original model, counted on first access."""
        return original_cost(self.captured)

    @cached_property
    def after(self) -> Cost:
        """Parameters and FLOPs of the merged model, counted on first access."""
        if isinstance(self.module, fx.GraphModule):
            return cost(self.module, self.captured.inputs)
        return call_cost(self.module, self.captured.args, self.captured.kwargs)

    @property
    def spent(self) -> Spent | None:
        """The budget and its outcome; None without a budget."""
        return spent(self.plan.options.budget, self.before, self.after, self.timing)

    def _costs(self) -> tuple[Cost, ...]:
        return (self.before, self.after)

    def _outcome(self) -> tuple[Sequence[Refitted], dict[str, float]]:
        return self.refitted, {"error": self.verdict.error, "seconds": self.seconds}

    def text(self, width: int = 120) -> str:
        """Tables of the merged groups, of refit, and of what was not merged and why; then the totals."""
        plans = {g.name: g for g in self.plan.groups}
        table = new_table("Merged groups", "group")
        add_number_columns(table, "channels", "parameters", "FLOPs", "similarity")
        add_text_columns(table, "note")
        for g in self.groups:
            if g.name in plans:
                table.add_row(*self._row(g, plans[g.name]))
        refitted = [refit_table(self.refitted)] if self.refitted else []
        refused = [refusal_table(self.refusals, self.captured)] if self.refusals else []
        return render(table, *refitted, *refused, self._totals(), width=width)

    def _row(self, group: Group, plan: GroupPlan) -> list[str]:
        """The cells of a merged group; parameters and FLOPs are those of its producers."""
        (p0, f0), (p1, f1) = _producer_cost(group, self.before), _producer_cost(group, self.after)
        return [
            group.name, f"{plan.channels} -> {len(plan.kept)}", f"{p0:,} -> {p1:,}", f"{f0:,} -> {f1:,}",
            f"{plan.similarity:.2f}", "; ".join(self._notes(group, plan)),
        ]  # fmt: skip

    def _notes(self, group: Group, plan: GroupPlan) -> list[str]:
        decomposition, notes = self.plan.options.decomposition, []
        staying = self._in_kept_blocks(group, plan)
        if staying < len(plan.kept):
            notes.append(f"kept channels in blocks that remain: {staying}")
        if decomposition == "mostsim" and group.scale_blocks:
            notes.append(
                f"merged without rescaling, because scaling does not pass through {first_names(group.scale_blocks)}"
            )
        why = unmerged(group, self._tensors, self.plan.options)
        if why:
            notes.append(f"dropped without merging: {why}")
        unpartnered = sum(p.into < 0 for p in plan.partners)
        if decomposition == "mostsim" and unpartnered and not why:
            notes.append(f"{unpartnered} dropped without a partner")
        return notes

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return state(self.captured.module)

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

    def _totals(self) -> str:
        before, after = self.before, self.after
        size = percent(after.parameters, before.parameters)
        return (
            f"parameters {before.parameters:,} -> {after.parameters:,} ({size} left)"
            f"\nFLOPs      {before.flops:,} -> {after.flops:,} ({percent(after.flops, before.flops)} left)"
            f"\nrelative error of the outputs on the example inputs: {self.verdict.text()}"
            + (f"\n{self.spent.line()}" if self.spent else "")
            + "".join(f"\n{note}" for note in self.notes)
            + left_out_line(self.captured)
        )

    def json(self) -> str:
        """JSON text: parameters_before, parameters_after, flops_before, flops_after, error, refit, groups, refusals.

        Its schema is fxmerge/assets/report.schema.json. An error that was not measured, or is not finite, is written
        as null, with "error_reason".
        """
        plans = {g.name: g for g in self.plan.groups}
        groups = []
        for g in self.groups:
            plan = plans.get(g.name)
            kept = list(plan.kept) if plan else list(range(g.channels))
            groups.append(
                {
                    **_group_json(g),
                    "kept": kept,
                    "similarity": plan.similarity if plan else 1.0,
                    "partners": list(plan.partners) if plan else [],
                }
            )
        return json_text(
            {
                "fxmerge_report": VERSION,
                "parameters_before": self.before.parameters,
                "parameters_after": self.after.parameters,
                "flops_before": self.before.flops,
                "flops_after": self.after.flops,
                "error": finite(self.verdict.error),
                **({"error_reason": self.verdict.reason} if self.verdict.reason else {}),
                **({"error_of_integers": self.verdict.differing} if self.verdict.differing is not None else {}),
                "refit": [finite(vars(r)) for r in self.refitted],
                **({"budget": vars(self.spent)} if self.spent else {}),
                "notes": list(self.notes),
                "groups": groups,
                "refusals": _refusals_json(self.refusals, self.captured),
            }
        )


def original_cost(captured: Capture) -> Cost:
    """Parameters and FLOPs of the model that was captured."""
    if captured.recorded is None:
        return cost(captured.module, captured.inputs)
    return call_cost(captured.recorded.host, captured.args, captured.kwargs)


def _producer_cost(group: Group, cost: Cost) -> tuple[int, int]:
    """(parameters, FLOPs) of a group's producers."""
    found = [cost.by_module.get(name, (0, 0)) for name in _members(group)["producers"]]
    return sum(p for p, _ in found), sum(f for _, f in found)


def _members(group: Group) -> dict[str, list[str]]:
    """The names of a group's layers by their part in the group."""
    parts = {
        "producers": group.producers,
        "per_channel_params": group.per_channel_params,
        "consumers": group.consumers,
    }
    return {part: list(dict.fromkeys(m.layer.module for m in members)) for part, members in parts.items()}


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "channels": group.channels,
        **_members(group),
        "mixers": list(group.mixers),
        "ties": list(group.ties),
        "internal": group.internal,
        "scale_blocks": list(group.scale_blocks),
    }


def _refusals_json(refusals: Sequence[Refusal], captured: Capture) -> list[dict[str, Any]]:
    return [
        {
            "name": r.name,
            "channels": r.channels,
            "parameters": parameters_held(r, captured),
            "reason": r.reason,
            "where": r.where,
        }
        for r in refusals
    ]
