"""The report of an analysis, as tables and as JSON; `drawable.py` adds the pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

from fxmerge.graph.cost import Cost
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Grouping, Refusal
from fxmerge.ir.provenance import Provenance
from fxmerge.report.drawable import Drawable
from fxmerge.report.group_data import cost_json, group_json, members, original_cost, producer_cost, refusals_json
from fxmerge.report.layout import WIDTH, Style, joined, lists, names, numbers, table, wrap
from fxmerge.report.tables import capture_lines, refusal_lines, short

VERSION = 2  # of the schema of the JSON


@dataclass(frozen=True, kw_only=True)
class AnalysisReport(Drawable):
    """The merge groups of a model, and the channels that cannot be merged."""

    captured: Capture
    facts: Provenance
    grouping: Grouping
    refusals: tuple[Refusal, ...]
    plan: None = None
    graph: None = None

    def __repr__(self) -> str:
        return f"<AnalysisReport of {self.captured.name}: {len(self.groups)} groups; .text() shows them>"

    @cached_property
    def cost(self) -> Cost:
        """Parameters and FLOPs of the model."""
        return original_cost(self.captured)

    def _costs(self) -> tuple[Cost, ...]:
        return (self.cost,)

    def text(self, width: int = 120, ascii: bool = False) -> str:
        """The groups with their members, the refusals with their reasons, and the totals, as plain text.

        width: of the longest line, at least 20; columns that do not fit are left out
        ascii: use ASCII characters only
        """
        style, groups, width = Style(ascii), self.groups, max(width, WIDTH)
        costs = [producer_cost(g, self.cost) for g in groups]
        columns = [
            names("group", [g.name for g in groups]),
            numbers("channels", [f"{g.channels:,}" for g in groups]),
            numbers("parameters", [f"{p:,}" for p, _ in costs], [short(p) for p, _ in costs]),
        ]
        parts = [members(g) for g in groups]
        columns += [
            lists("consumers", [m["consumers"] for m in parts]),
            lists("other producers", [m["producers"][1:] for m in parts]),  # a group has the name of its first
            lists("per-channel parameters", [m["per_channel_params"] for m in parts]),
        ]
        found = table(f"Merge groups of {self.captured.name}", columns, width, style)
        found = found if groups else wrap(f"{self.captured.name} has no merge groups", width, style)
        refused = refusal_lines("Cannot be merged", self.refusals, self.captured, width, style)
        total = f"{len(groups)} groups, {self.cost.parameters:,} parameters, {self.cost.flops:,} FLOPs"
        return joined([found, refused], [total, *capture_lines(self.captured)], width, style)

    def json(self) -> str:
        """JSON text with the groups, refusals, parameters and FLOPs. Schema: fxmerge/assets/report.schema.json."""
        return json.dumps(
            {
                "fxmerge_report": VERSION,
                "model": self.captured.name,
                "parameters": self.cost.parameters,
                "flops": self.cost.flops,
                "groups": [group_json(g) | cost_json(g, self.cost) for g in self.groups],
                "refusals": refusals_json(self.refusals, self.captured),
            },
            indent=1,
        )
