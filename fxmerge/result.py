"""Results: what an analysis and a merge give back, and the forms that a merged model can leave in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxmerge.export import program, save
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal, survivors
from fxmerge.ir.provenance import Provenance
from fxmerge.plan import Plan, planned
from fxmerge.report.reports import AnalysisReport, Report

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Analysis:
    """What could be merged and what could not: nothing is changed."""

    captured: Capture
    facts: Provenance
    grouping: Grouping
    refusals: tuple[Refusal, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.grouping.everything

    @property
    def graph(self) -> Any:
        """Groups and layers as a networkx graph (see `groups`)."""
        return self.grouping.graph

    @property
    def report(self) -> AnalysisReport:
        return AnalysisReport(captured=self.captured, facts=self.facts, grouping=self.grouping, refusals=self.refusals)

    def _repr_html_(self) -> str:
        """The report's page, in a notebook."""
        return self.report._repr_html_()


@dataclass(frozen=True)
class Result:
    """A merged model, and why it is as it is."""

    module: nn.Module  # a torch.fx.GraphModule; of the user's own class where only parts of it could be traced
    plan: Plan
    report: Report
    analysis: Analysis

    def _repr_html_(self) -> str:
        """The report's page, in a notebook."""
        return self.report._repr_html_()

    def save(self, folder: str | Path) -> None:
        """Write model.py, weights.safetensors, plan.json and the report into a folder, whole or not at all.

        Raises FxMergeError where the folder holds files of others; `fxmerge.load` reads it.
        """
        captured, facts, groups = self.analysis.captured, self.analysis.facts, self.analysis.grouping
        kept = planned(groups.everything, self.plan)
        save.save(Path(folder), captured, self.module, self.plan, self.report, facts, survivors(groups, kept))

    def exported(self, dynamic_shapes: Any = None) -> ExportedProgram:
        """The merged model as torch.export has it; one that came as an ExportedProgram keeps its dynamic shapes.

        dynamic_shapes: as torch.export.export takes them. Raises FxMergeError where torch.export cannot.
        """
        captured = self.analysis.captured
        return program.exported(
            self.module, captured.args, captured.kwargs, dynamic_shapes or program.dynamic(captured.program)
        )

    def save_program(self, path: str | Path) -> None:
        """Write `exported()` as a .pt2 file, whole or not at all; torch.export.load reads it."""
        program.save(self.exported(), Path(path))

    def to_onnx(self, path: str | Path, dynamic_shapes: Any = None) -> None:
        """Write the merged model as an ONNX file, by way of `exported`. Needs fxmerge[onnx].

        Raises FxMergeError where torch.export or torch.onnx cannot.
        """
        program.to_onnx(self.exported(dynamic_shapes), Path(path))
