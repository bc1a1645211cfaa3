"""Report: the records of a merge as a table and as JSON; how they are drawn is in `showing.py`."""

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
from fxmerge.refit.refit_layers import Refitted
from fxmerge.report.budget_line import Spent, spent
from fxmerge.report.drawable import Shown
from fxmerge.report.refusals import parameters_held
from fxmerge.report.tables import (
    left_out_line,
    listed,
    refit_table,
    refusal_table,
    right_columns,
    share_text,
    tables_text,
)

VERSION = 1  # of the JSON's schema


def _members(group: Group, role: str) -> list[str]:
    members = {
        "producers": group.producers,
        "per_channel_params": group.per_channel_params,
        "consumers": group.consumers,
    }[role]
    return list(dict.fromkeys(m.layer.module for m in members))


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


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "channels": group.channels,
        **{role: _members(group, role) for role in ("producers", "per_channel_params", "consumers")},
        "mixers": list(group.mixers),
        "ties": list(group.ties),
        "internal": group.internal,
        "scale_blocks": list(group.scale_blocks),
    }


@dataclass(frozen=True, kw_only=True)
class AnalysisReport(Shown):
    """What could be merged, and what could not."""

    captured: Capture
    facts: Provenance = field(repr=False)
    grouping: Grouping = field(repr=False)
    refusals: tuple[Refusal, ...]
    plan: None = None

    @cached_property
    def cost(self) -> Cost:
        return original_cost(self.captured)

    def _costs(self) -> tuple[Cost, ...]:
        return (self.cost,)

    def text(self, width: int = 120) -> str:
        """Two tables: the groups with their members, and the refusals with their reasons."""
        from rich.table import Table

        table = Table(title="Merge groups", title_justify="left")
        table.add_column("group", overflow="fold")
        right_columns(table, "channels")
        for name in ("producers", "per_channel_params", "consumers"):
            table.add_column(name, overflow="fold")
        for g in self.groups:
            members = [listed(_members(g, role)) for role in ("producers", "per_channel_params", "consumers")]
            table.add_row(g.name, str(g.channels), *members)
        total = f"{len(self.groups)} groups, {self.cost.parameters:,} parameters, {self.cost.flops:,} FLOPs"
        total += left_out_line(self.captured)
        return tables_text(
            table, *([refusal_table(self.refusals, self.captured)] if self.refusals else []), total, width=width
        )

    def json(self) -> str:
        """JSON text: groups, refusals, parameters, flops. Its schema is fxmerge/assets/report.schema.json."""
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
class Report(Shown):
    """What a merge did, to whom, at what price."""

    captured: Capture
    facts: Provenance = field(repr=False)
    grouping: Grouping = field(repr=False)
    refusals: tuple[Refusal, ...]
    module: nn.Module
    plan: Plan
    verdict: Verdict
    refitted: tuple[Refitted, ...] = ()
    notes: tuple[str, ...] = ()  # requests that were not, or not fully, carried out
    seconds: float  # that the merge took
    timing: Timing | None = None  # of the merged model, if a latency budget was given

    @cached_property
    def before(self) -> Cost:
        """What the original weighs and costs, counted when first asked for."""
        return original_cost(self.captured)

    @cached_property
    def after(self) -> Cost:
        if isinstance(self.module, fx.GraphModule):
            return cost(self.module, self.captured.inputs)
        return call_cost(self.module, self.captured.args, self.captured.kwargs)

    def _costs(self) -> tuple[Cost, ...]:
        return (self.before, self.after)

    def _outcome(self) -> tuple[Sequence[Refitted], dict[str, float]]:
        return self.refitted, {"error": self.verdict.error, "seconds": self.seconds}

    def text(self, width: int = 120) -> str:
        """Tables: what each group lost; what was left alone and why; totals."""
        from rich.table import Table

        planned = {g.name: g for g in self.plan.groups}
        table = Table(title="Merged", title_justify="left")
        table.add_column("group", overflow="fold")
        right_columns(table, "channels", "parameters", "FLOPs", "similarity kept")
        table.add_column("note", overflow="fold")
        for g in self.groups:
            if g.name in planned:
                table.add_row(*self._row(g, planned[g.name]))
        more = [refusal_table(self.refusals, self.captured)] if self.refusals else []
        if self.refitted:
            more.insert(0, refit_table(self.refitted))
        return tables_text(table, *more, self._totals(), width=width)

    def _producer_cost(self, group: Group, cost: Cost) -> tuple[int, int]:
        names = [m.layer.module for m in group.producers]
        found = [cost.by_module.get(name, (0, 0)) for name in dict.fromkeys(names)]
        return sum(p for p, _ in found), sum(f for _, f in found)

    def _row(self, group: Group, plan: GroupPlan) -> list[str]:
        (p0, f0), (p1, f1) = self._producer_cost(group, self.before), self._producer_cost(group, self.after)
        merged = sum(p.into >= 0 for p in plan.partners)
        note = []
        staying = self._in_blocks_that_stay(group, plan)
        if staying < len(plan.kept):
            note.append(f"{staying} in blocks that stay")
        if self.plan.options.decomposition == "mostsim" and group.scale_blocks:
            note.append(f"scale 1 ({listed(list(group.scale_blocks))})")
        if self.plan.options.decomposition != "prune" and not group.partners:
            note.append("dropped, not merged: whole blocks, or copies that do not line up")
        if self.plan.options.decomposition == "mostsim" and merged < len(plan.partners) and group.partners:
            note.append(f"{len(plan.partners) - merged} dropped without a partner")
        return [
            group.name, f"{plan.channels} -> {len(plan.kept)}", f"{p0:,} -> {p1:,}", f"{f0:,} -> {f1:,}",
            f"{plan.similarity:.2f}", "; ".join(note),
        ]  # fmt: skip

    def _in_blocks_that_stay(self, group: Group, plan: GroupPlan) -> int:
        """How many of a group's kept channels stand in blocks that do not leave whole (heads="both")."""
        if self._staying is None or all(g.name != group.name for g in self.grouping.groups):
            return len(plan.kept)
        return int(self._staying[group.atoms[list(plan.kept)]].sum())

    @cached_property
    def _staying(self) -> torch.Tensor | None:
        """(atoms,) does any label of the atom stand in a block that stays? None where no blocks leave besides."""
        if (wholes := self.grouping.wholes) is None:
            return None
        alive = survivors(wholes, planned(wholes.groups, self.plan))
        stays = torch.zeros(int(self.grouping.atom.max()) + 1, dtype=torch.bool)
        stays[self.grouping.atom[alive]] = True
        return stays

    def _totals(self) -> str:
        before, after = self.before, self.after
        size = share_text(after.parameters, before.parameters)
        return (
            f"parameters {before.parameters:,} -> {after.parameters:,} ({size} left)"
            f"\nFLOPs      {before.flops:,} -> {after.flops:,} ({share_text(after.flops, before.flops)} left)"
            f"\nrelative error of the outputs on the example inputs: {self.verdict.error:.3g}"
            + (f"\n{self.spent.line()}" if self.spent else "")
            + "".join(f"\n{note}" for note in self.notes)
            + left_out_line(self.captured)
        )

    @property
    def spent(self) -> Spent | None:
        """What the budget asked for and what is left; None without a budget."""
        return spent(self.plan.options.budget, self.before, self.after, self.timing)

    def json(self) -> str:
        """JSON text: parameters_before, parameters_after, flops_before, flops_after, error, refit, groups, refusals.

        Its schema is fxmerge/assets/report.schema.json. An error that is no finite number is null.
        """
        planned = {g.name: g for g in self.plan.groups}
        groups = []
        for g in self.groups:
            plan = planned.get(g.name)
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
                "refit": [finite(vars(r)) for r in self.refitted],
                **({"budget": vars(self.spent)} if self.spent else {}),
                "notes": list(self.notes),
                "groups": groups,
                "refusals": _refusals_json(self.refusals, self.captured),
            }
        )


def original_cost(captured: Capture) -> Cost:
    if captured.recorded is None:
        return cost(captured.module, captured.inputs)
    return call_cost(captured.recorded.host, captured.args, captured.kwargs)
