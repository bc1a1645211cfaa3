"""Which regions of a graph are fitted together in a refit, when, and what is kept until then.

A region is fitted when the paired run has reached the last of its ends. Until then, the values that it reads from
outside are kept, and for each of its other ends what the outputs should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmerge.calibration.held_out import HELD_OUT
from fxmerge.calibration.paired_run import PairedRun, Settings, Visit
from fxmerge.calibration.patches import matrices_of, positions
from fxmerge.calibration.tail import shaped
from fxmerge.graph.cost import flops_by_node
from fxmerge.ir.provenance import Layer
from fxmerge.refit import joint
from fxmerge.refit.layer_weights import GraphWeights
from fxmerge.refit.records import EXACTLY, TOO_FEW, Refitted
from fxmerge.refit.regions import Region
from fxmerge.refit.sites import Site, Sites
from fxmerge.refit.solve import Rows, relative_error


class JointSteps:
    """The joint steps of a refit.

    weights: of the merged graph; batches: what it is run on; ridges: with which layers have been solved, by node
    """

    def __init__(
        self,
        regions: Sequence[Region],
        weights: GraphWeights,
        batches: Sequence[Sequence[object]],
        settings: Settings,
        ridges: Mapping[str, float],
    ) -> None:
        self.weights, self.settings, self.ridges = weights, settings, ridges
        self.regions, self.used = regions, 0  # used: the batches that joint steps are run on
        if regions:
            flops = flops_by_node(weights.module, batches[0])
            total = sum(flops[node.name] for region in regions for node in region.nodes)
            device = self.weights.weight(regions[0].layers[0]).device
            self.used = joint.affordable(total, len(batches), device, settings.reduce)

    def start(self, paired: PairedRun, sites: Sites) -> None:
        """Begin a run of both graphs."""
        self.paired, self.sites = paired, sites
        self.waiting: dict[str, _End] = {}  # ends that have been solved, by node
        self._plan(self.regions if self.used else [])
        for region in self.planned:
            paired.merged.keep(region.outside | region.inputs, region.ends[-1])

    def _plan(self, regions: Sequence[Region]) -> None:
        """The regions that joint steps are still run on in this run."""
        self.planned = list(regions)
        self.starts = {name: region for region in regions for name in region.starts}
        self.ends = {name: region for region in regions for name in region.ends}
        self.within = {layer.node for region in regions for layer in region.layers}
        self.readers: dict[str, list[Region]] = {}
        for region in regions:
            for node in {*region.replay, *region.nodes}:
                self.readers.setdefault(node.name, []).append(region)

    def reach(self, visit: Visit, layer: Layer | None) -> None:
        """Remember what a region reads from outside; leave it to single layers if a first layer has few positions."""
        for region in self.readers.get(visit.node.name, ()):
            region.watch(visit.node, self.paired.merged.values)
        if layer is None or visit.node.name not in self.starts:
            return
        form, weight = self.weights.form(visit.node, layer), self.weights.weight(layer)
        count = 0.0 if form is None else float(sum(positions(y, form) for y in shaped(visit.outputs[: self.used])))
        least = 1 if form is None else joint.POSITIONS * matrices_of(weight, form).size(2)
        if float(self.settings.reduce(weight.new_tensor(count, dtype=torch.float64))) < least:
            without = self.starts[visit.node.name]
            self._plan([region for region in self.planned if region is not without])

    def solved(self, site: Site, index_of: Sequence[Tensor], rows: Rows, found: Refitted) -> dict[str, Refitted]:
        """Fit a region after the last of its ends has been solved. Returns the records of its ends, by node.

        index_of, rows: the output positions that the end was solved on; found: its record
        """
        node = site.visit.node.name
        region = self.ends.get(node)
        if region is None or found.note == TOO_FEW:
            return {node: found}
        self.waiting[node] = self._end(site, index_of, rows, found)
        if node != region.ends[-1]:
            return {node: found}
        ends = {name: self.waiting.pop(name) for name in region.ends if name in self.waiting}
        exact = all(end.found.note == EXACTLY for end in ends.values())
        if exact or len(ends) < len(region.ends) or not region.intact(self.paired.merged.values):
            return {node: found}
        return self._again(ends) if self._fit(region, ends) else {node: found}

    def _end(self, site: Site, index_of: Sequence[Tensor], rows: Rows, found: Refitted) -> _End:
        count = self._plenty(site)
        held = [folds == HELD_OUT for folds in self.sites.folds(site)[:count]]
        real = self.paired.real(site.visit.node.name, site.visit.outputs, site.held.form)[:count]
        targets = [self.sites.target(site, number) for number in range(count)]
        wanted = joint.End(
            targets=targets,
            held=[one if own is None else one & own for one, own in zip(held, real, strict=True)],
            used=[~one if own is None else ~one & own for one, own in zip(held, real, strict=True)],
        )
        judging = [index[folds == HELD_OUT] for index, folds in zip(index_of, rows.folds, strict=True)]
        return _End(site, wanted, judging, rows.judging, found, self._error(site, rows.judging))

    def _error(self, site: Site, rows: Rows) -> float:
        own = self.weights.of(site.visit.node, site.layer)
        assert own is not None
        return relative_error(rows, own.matrices, own.offsets, self.settings.reduce)

    def _plenty(self, site: Site) -> int:
        """The number of batches that have ENOUGH positions, or of all that are used."""
        count = sum(positions(y, site.held.form) for y in shaped(site.visit.outputs[: self.used]))
        every = float(self.settings.reduce(site.affine.gain.new_tensor(float(count))))
        return max(1, min(self.used, round(self.used * joint.ENOUGH / max(every, 1.0))))

    def _fit(self, region: Region, ends: Mapping[str, _End]) -> bool:
        """Fit the layers of a region together; the merged graph then continues with all of them."""
        nodes: dict[str, fx.Node] = {node.name: node for node in region.nodes}
        weights = {layer.node: self.weights.of(nodes[layer.node], layer) for layer in region.layers}
        known = {name: own for name, own in weights.items() if own is not None}
        if len(known) < len(weights):
            return False
        count = min(len(end.wanted.targets) for end in ends.values())
        wanted = {name: end.wanted.first(count) for name, end in ends.items()}
        better = joint.fit(self.paired, region, known, wanted, ridges=self.ridges, seed=self.settings.seed)
        if better:
            live = self.paired.merged.values
            for number in range(len(self.paired.merged.batches)):
                values, _ = joint.along(self.paired, region.replay, number)
                for name in values.keys() & live.keys():
                    self.paired.merged.put(name, number, values[name])
        return better

    def _again(self, ends: Mapping[str, _End]) -> dict[str, Refitted]:
        """The records of ends whose region has been fitted."""
        found = {}
        for name, end in ends.items():
            rows = Rows(self.sites.patches(end.site, end.index_of), end.judging.targets, end.judging.folds)
            share = self._error(end.site, rows) / max(end.reached, 1e-300)
            found[name] = Refitted(end.site.layer.module, end.found.before, end.found.after * share)
        return found


@dataclass(frozen=True)
class _End:
    """An end that has been solved alone, the positions that judge it, its record, and its error on these positions."""

    site: Site
    wanted: joint.End
    index_of: list[Tensor]
    judging: Rows
    found: Refitted
    reached: float
