"""What the reports of an analysis and of a merge have in common: the formats in which they can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import fx

from fxmerge.analysis.group_graph import graphml
from fxmerge.errors import FxMergeError
from fxmerge.graph.cost import Cost
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal
from fxmerge.ir.provenance import Provenance
from fxmerge.plan import Plan
from fxmerge.refit.records import Refitted
from fxmerge.report.headline import analysed
from fxmerge.report.picture import formats
from fxmerge.report.picture.build import draw
from fxmerge.report.picture.group_panel import group_panels
from fxmerge.report.picture.layer_panel import layer_panels
from fxmerge.report.picture.notebook import cell
from fxmerge.report.picture.page import page
from fxmerge.report.picture.records import Picture
from fxmerge.report.tables import percent
from fxmerge.weights.files import write_text

# file extension -> the method of `Drawable` that returns the file's text
DRAWN = {".html": "html", ".svg": "svg", ".dot": "dot", ".gv": "dot", ".mmd": "mermaid", ".graphml": "graphml",
         ".json": "json"}  # fmt: skip


class Drawable:
    """A report that can be drawn. Each format's method returns the text and, given a path, also writes it there.

    A method that writes raises FxMergeError if the folder of the path does not exist.
    """

    captured: Capture
    facts: Provenance
    grouping: Grouping
    refusals: tuple[Refusal, ...]
    plan: Plan | None
    graph: fx.GraphModule | None  # of the merged model, after a merge

    @property
    def groups(self) -> tuple[Group, ...]:
        """The merge groups, including those of blocks that are removed as a whole."""
        return self.grouping.everything

    @cached_property
    def picture(self) -> Picture:
        """The boxes, arrows, frames and groups that all formats show."""
        return draw(self.captured, self.facts, self.grouping, self.refusals, self.plan)

    @cached_property
    def _panels(self) -> list[dict[str, Any]]:
        """What the page shows of each group."""
        return group_panels(self.groups, self.captured, self.plan, self._costs(), self._outcome()[0])

    def read_weights(self) -> None:
        """Reads now what any format shows of weights that are divided among processes, as all of them must take part.

        Later, one alone may print the report. Of other models, weights are read when they are shown.
        """
        if self.captured.sharding:
            _ = self._costs(), self._panels

    def _costs(self) -> tuple[Cost, ...]:
        """The cost of the original and, after a merge, of the merged model."""
        raise NotImplementedError

    def _outcome(self) -> tuple[Sequence[Refitted], dict[str, float | str]]:
        """The refitted layers and the figures of the merge that the page's header shows."""
        return (), {"sentence": analysed(self.captured.name, len(self.groups), len(self.refusals))}

    def json(self) -> str:
        """The report's records as JSON text."""
        raise NotImplementedError

    def draw(self, path: str | Path) -> None:
        """Write the file in the format of its extension. Raises FxMergeError for an extension not in `DRAWN`."""
        text: str = getattr(self, drawn_as(path))()
        _written(text, path)

    def html(self, path: str | Path | None = None) -> str:
        """A self-contained HTML page with the network, its groups and their channels. It opens without a network."""
        costs = self._costs()
        figures = self._outcome()[1]
        layers = layer_panels(self.picture.boxes, self.captured, self.facts.layers, costs, self.graph)
        summary = {"parameters": [c.parameters for c in costs], "flops": [c.flops for c in costs], **figures}
        return _written(page(self.picture, summary, self._panels, layers), path)

    def _repr_html_(self) -> str:
        """For a notebook: the figures, and a button that opens the page."""
        return cell(self.picture.title, self._figures(), getattr(self, "notices", ()), self.html())

    def _figures(self) -> list[tuple[str, str]]:
        """The rows of the table in a notebook."""
        costs, (_, figures), groups = self._costs(), self._outcome(), f"{len(self.groups):,}"
        if self.plan is None:
            counts = [(c.parameters, c.flops) for c in costs]
            return [("parameters", f"{counts[0][0]:,}"), ("FLOPs", f"{counts[0][1]:,}"), ("groups", groups)]
        pairs = zip(*((c.parameters, c.flops) for c in costs), strict=True)
        sizes = [f"{one:,} -> {two:,} ({percent(two, one)} left)" for one, two in pairs]
        error = f"{figures['error']:.3g}" if figures["error"] == figures["error"] else str(figures["reason"])
        merged = f"{len(self.plan.groups)} of {groups} merged"
        return [("parameters", sizes[0]), ("FLOPs", sizes[1]), ("groups", merged), ("error of the outputs", error)]

    def dot(self, path: str | Path | None = None) -> str:
        """The whole network in Graphviz's DOT language."""
        return _written(formats.dot(self.picture), path)

    def svg(self, path: str | Path | None = None) -> str:
        """An SVG, laid out by Graphviz. Raises FxMergeError if Graphviz is not installed."""
        return _written(formats.svg(self.picture), path)

    def mermaid(self, path: str | Path | None = None) -> str:
        """A Mermaid flowchart, which GitHub renders in Markdown. Inner modules of large networks are collapsed."""
        return _written(formats.mermaid(self.picture), path)

    def graphml(self, path: str | Path | None = None) -> str:
        """`Analysis.graph` as GraphML."""
        return _written(graphml(self.grouping.graph), path)

    def model_explorer(self, path: str | Path | None = None) -> str:
        """Node data for Model Explorer. Given a path NAME.json, the graph is written to NAME.graph.json."""
        data, graph = formats.model_explorer(self.picture)
        if path is not None:
            _written(graph, Path(path).with_suffix(".graph.json"))
        return _written(data, path)


def drawn_as(path: str | Path) -> str:
    """The method of `Drawable` for a file's extension. Raises FxMergeError for an extension not in `DRAWN`."""
    extension = Path(path).suffix.lower()
    if extension not in DRAWN:
        raise FxMergeError(f"the format of {str(path)!r} is unknown; use one of the extensions {', '.join(DRAWN)}")
    return DRAWN[extension]


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        target = Path(path)
        if not target.parent.is_dir():
            raise FxMergeError(f"the folder {target.parent} for {target.name} does not exist; create it first")
        write_text(target, text)
    return text
