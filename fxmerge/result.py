"""The results of an analysis and of a merge, and the formats that a merged model can be saved in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxmerge.errors import FxMergeError
from fxmerge.export import hugging_face, program, save
from fxmerge.export.check import Expected
from fxmerge.export.own_model import Own, into, own_model
from fxmerge.ir.capture import Capture, Sharding
from fxmerge.ir.groups import Group, Grouping, Refusal
from fxmerge.ir.provenance import Provenance
from fxmerge.plan import Plan
from fxmerge.report.analysis_report import AnalysisReport
from fxmerge.report.reports import Report
from fxmerge.weights.copy import inside
from fxmerge.weights.on_disk import in_memory
from fxmerge.weights.shards import divided, undivided, written_once

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Analysis:
    """A model's merge groups, and the channels that cannot be merged."""

    captured: Capture
    facts: Provenance
    grouping: Grouping
    refusals: tuple[Refusal, ...]

    def __post_init__(self) -> None:
        if self.captured.sharding:
            self.report.read_weights()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The merge groups, including those of blocks that can be removed as a whole."""
        return self.grouping.everything

    @property
    def graph(self) -> Any:
        """The groups and layers as a networkx.DiGraph (see analysis/groups.py)."""
        return self.grouping.graph

    @cached_property
    def report(self) -> AnalysisReport:
        """The analysis as text, JSON or a drawing."""
        return AnalysisReport(captured=self.captured, facts=self.facts, grouping=self.grouping, refusals=self.refusals)

    def __repr__(self) -> str:
        name = self.captured.name
        return f"<Analysis of {name}: {len(self.groups)} groups, {len(self.refusals)} refusals; .report shows them>"

    def _repr_html_(self) -> str:
        """For a notebook: the figures, and a button that opens the page."""
        return self.report._repr_html_()


@dataclass(frozen=True)
class Result:
    """A merged model, with the decisions that led to it."""

    module: nn.Module  # a torch.fx.GraphModule, or of the user's own class if only parts of it could be traced
    plan: Plan
    report: Report
    analysis: Analysis

    def __post_init__(self) -> None:
        self.report.read_weights()

    def __repr__(self) -> str:
        name, groups = self.analysis.captured.name, f"{len(self.plan.groups)} of {len(self.analysis.groups)} groups"
        return f"<Result of {name}: {groups} merged; .module is the model, .report what was done>"

    def _repr_html_(self) -> str:
        """For a notebook: the figures, and a button that opens the page."""
        return self.report._repr_html_()

    @property
    def model(self) -> nn.Module | None:
        """The merged model in the class of the model that was given, with its methods, hooks and modes.

        It is made on first use: a copy of that model in which the tensors are the merged ones, and attributes that
        hold widths (`head_dim`, `in_channels`) have followed. None if the class cannot take the merged weights: sizes
        may be written in its code, or its layers cannot differ in width. `report` then says why, and which groups to
        leave whole, if that helps.
        """
        return self._model

    @cached_property
    def _model(self) -> nn.Module | None:
        own = self._own.model
        return None if own is None else divided(own, self._sharding)

    @cached_property
    def _own(self) -> Own:
        made = own_model(self.report)
        if made.fit.refused:
            self.report.later.append(f"result.model is None: {made.fit.refused}{made.hint}")
        return made

    def into(self, other: nn.Module) -> nn.Module:
        """A copy of another instance of the user's class that has the merged weights, as in `model`.

        Raises FxMergeError if the class cannot take them, or if `other` is not of the class that was merged.
        """
        return divided(into(other, self.report, self._own), self._sharding)

    def save(self, folder: str | Path) -> None:
        """Writes model.py, weights.safetensors, plan.json and the report to a folder, all or none of them.

        `fxmerge.load` reads the folder. Raises FxMergeError if the folder contains files that fxmerge did not write.
        """
        report = replace(self.report, module=undivided(self.module)[0]) if self._sharding else self.report
        with written_once(folder, self._sharding) as path:
            save.save(path, report)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a merged model of Hugging Face transformers as a folder that its from_pretrained reads.

        A plain model with a configuration of other widths, if there is one; otherwise with a modelling file, which
        from_pretrained(folder, trust_remote_code=True) reads. A tokenizer's files in the folder stay. Raises
        FxMergeError for other models, if the class cannot take the merged weights, and if the folder holds other files.
        """
        if not hugging_face.is_hugging_face(self.analysis.captured.model):
            raise FxMergeError(
                f"{self.analysis.captured.name} is not a model of Hugging Face transformers; use result.save(folder)"
            )
        if self.model is None:
            raise FxMergeError(
                f"the merged model does not fit into its class: {self._own.fit.refused}; use result.save(folder)"
            )
        own, (_, expected) = self._whole(inside(self.model)), self._expected()
        with written_once(folder, self._sharding) as path:
            hugging_face.save_pretrained(path, own, self.analysis.captured.model, expected)

    def exported(self, dynamic_shapes: Any = None) -> ExportedProgram:
        """The merged model as an ExportedProgram.

        dynamic_shapes: as for torch.export.export; by default those given to `merge`, or those of the original if it
            was an ExportedProgram.
        Raises FxMergeError if torch.export cannot export the model, or if the program returns other values.
        """
        return self._exported(*self._expected(), dynamic_shapes)

    def save_program(self, path: str | Path) -> None:
        """Writes `exported()` to a .pt2 file, which torch.export.load reads. No partial file is left after an error.

        Raises FxMergeError as `exported` does, also for the program in the file.
        """
        module, expected = self._expected()
        with written_once(path, self._sharding) as there:
            program.save(self._exported(module, expected), there, expected)

    def to_onnx(self, path: str | Path, dynamic_shapes: Any = None) -> None:
        """Writes `exported(dynamic_shapes)` to an ONNX file. Needs the extra fxmerge[onnx].

        Raises FxMergeError if torch.export or torch.onnx cannot convert the model, or if onnxruntime returns other
        values for the file.
        """
        module, expected = self._expected()
        made = self._exported(module, expected, dynamic_shapes)
        with written_once(path, self._sharding) as there:
            program.to_onnx(made, there, expected, random=expected.is_random(module))

    @property
    def _sharding(self) -> Sharding | None:
        return self.analysis.captured.sharding

    def _whole(self, module: nn.Module) -> nn.Module:
        """The module, or a copy with all weights in this process where they are divided among several."""
        return in_memory(module) if self._sharding else module

    def _expected(self) -> tuple[nn.Module, Expected]:
        """The merged module with all of its weights, and what it returns."""
        module = self._whole(self.module)
        return module, Expected(self.analysis.captured, module)

    def _exported(self, module: nn.Module, expected: Expected, dynamic_shapes: Any = None) -> ExportedProgram:
        captured = self.analysis.captured
        shapes = dynamic_shapes or program.dynamic(captured.program) or captured.dynamic_shapes
        return program.exported(module, expected, shapes)
