"""Showing: what the reports of an analysis and of a merge have in common, the ways in which they can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from fxmerge.analysis.groups import graphml
from fxmerge.errors import FxMergeError
from fxmerge.graph.cost import Cost
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal
from fxmerge.ir.provenance import Provenance
from fxmerge.plan import Plan
from fxmerge.refit.refit_layers import Refitted
from fxmerge.report.picture import formats
from fxmerge.report.picture.build import draw
from fxmerge.report.picture.group_panel import sheets
from fxmerge.report.picture.page import frame, page
from fxmerge.report.picture.records import Picture
from fxmerge.weights.files import write_text

DRAWN = {".html": "html", ".svg": "svg", ".dot": "dot", ".gv": "dot", ".mmd": "mermaid", ".graphml": "graphml",
         ".json": "json"}  # fmt: skip


class Shown:
    """A report that can be drawn. Each way gives the text, and writes it where a path is given."""

    captured: Capture
    facts: Provenance
    grouping: Grouping
    refusals: Sequence[Refusal]
    plan: Plan | None

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.grouping.everything

    def _costs(self) -> tuple[Cost, ...]:
        """The original's, and the merged model's where there is one."""
        raise NotImplementedError

    def _outcome(self) -> tuple[Sequence[Refitted], dict[str, float]]:
        """What refit did, and the page's figures of the merge."""
        return (), {}

    @cached_property
    def picture(self) -> Picture:
        """What all drawings show: boxes, arrows, frames, groups."""
        return draw(self.captured, self.facts, self.grouping, self.refusals, self.plan)

    def json(self) -> str:
        """The report's records (see `report.py`)."""
        raise NotImplementedError

    def draw(self, path: str | Path) -> None:
        """Write the drawing that a file's ending asks for. Raises FxMergeError for an ending not in DRAWN."""
        way = drawn_as(path)
        _written(getattr(self, way)(), path)

    def html(self, path: str | Path | None = None) -> str:
        """One self-contained page: the network, its groups, what each lost. It needs no network to be opened."""
        costs = self._costs()
        refitted, figures = self._outcome()
        told = sheets(self.groups, self.captured, self.plan, costs, refitted)
        summary = {"parameters": [c.parameters for c in costs], "flops": [c.flops for c in costs], **figures}
        return _written(page(self.picture, summary, told), path)

    def _repr_html_(self) -> str:
        """The page, in a notebook."""
        return frame(self.html())

    def dot(self, path: str | Path | None = None) -> str:
        """The whole network in Graphviz's language."""
        return _written(formats.dot(self.picture), path)

    def svg(self, path: str | Path | None = None) -> str:
        """An SVG, laid out by Graphviz's `dot`. Raises FxMergeError where that is not installed."""
        return _written(formats.svg(self.picture), path)

    def mermaid(self, path: str | Path | None = None) -> str:
        """A Mermaid flowchart, as Markdown on GitHub shows it; inner modules of large networks are closed."""
        return _written(formats.mermaid(self.picture), path)

    def graphml(self, path: str | Path | None = None) -> str:
        """`Analysis.graph` as GraphML."""
        return _written(graphml(self.grouping.graph), path)

    def model_explorer(self, path: str | Path | None = None) -> str:
        """Node data for Model Explorer; the graph that it is about is written beside it, as NAME.graph.json."""
        data, graph = formats.model_explorer(self.picture)
        if path is not None:
            _written(graph, Path(path).with_suffix(".graph.json"))
        return _written(data, path)


def drawn_as(path: str | Path) -> str:
    """The way that a file's ending asks for. Raises FxMergeError for another ending."""
    ending = Path(path).suffix.lower()
    if ending not in DRAWN:
        raise FxMergeError(f"cannot tell from {str(path)!r} what to draw; let it end in {', '.join(DRAWN)}")
    return DRAWN[ending]


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        target = Path(path)
        if not target.parent.is_dir():
            raise FxMergeError(f"there is no folder {target.parent} to write {target.name} to; make it first")
        write_text(target, text)
    return text
