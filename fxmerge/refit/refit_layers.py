"""Refit: the original and the merged graph in lockstep; each layer behind the first merged group is re-solved.

At a linear layer or convolution of the merged graph whose input is no longer the original's, in execution order:

    P   patches of the merged stream at this layer, a sample of all output positions
    T   what the original puts out there, channels that stay, corrected as `targets` tells
    W'  argmin |P W' - T|^2 + ridge |W' - W0|^2, W0 the weight that is there (`systems`)

and the merged stream goes on with W'. Both consumers that lost channels and producers whose input has moved are solved.
Where a BatchNorm follows, mean and deviation of its input are then matched to the original's, channel by channel.
A consumer that lost channels is then fitted once more together with their producer, where no other layer reads them
(`joint`). A layer is left as it is where the original's outputs come out anyway, where one weight serves several calls,
and where no solution is better than the weight that is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, fx

from fxmerge.calibration import epilogue
from fxmerge.calibration.paired_run import Lockstep, Pair, Settings, Step, line, moments
from fxmerge.calibration.patches import (
    FEWEST,
    at_positions,
    channel_axis,
    enough,
    input_of,
    patches,
    positions,
    rows_of,
    sample,
)
from fxmerge.graph.cost import flops_by_node
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.provenance import Layer, can_shift
from fxmerge.refit import joint, targets
from fxmerge.refit import targets as aims
from fxmerge.refit.chains import Chain, chains
from fxmerge.refit.layer_weights import Place, Places
from fxmerge.refit.solve import ROUNDS, Rows, error, solution
from fxmerge.weights.by_path import at

EXACT = 1e-10  # relative square error at which a layer needs no refit


@dataclass(frozen=True)
class Refitted:
    """What refit did to one layer: relative square error of its outputs before and after, and why it was left alone."""

    name: str
    before: float
    after: float
    note: str = ""


def refit(
    pair: Pair,
    batches: Sequence[Sequence[object]],
    settings: Settings,
    stage: Callable[[str], None] = lambda name: None,
) -> tuple[Refitted, ...]:
    """Re-solve the layers of the pair's merged graph in place, on batches of values of the graph's placeholders.

    Cost: two forward passes, a product (p, rows) (rows, p) for each layer of p weights an output, and `joint.PASSES`
    forward passes of the merged layers that are fitted jointly, within `joint.BUDGET`.
    """
    assert pair.merged is not None
    with evaluating(pair.original, pair.merged), torch.no_grad():
        return _Refit(pair, batches, settings).run(stage)


@dataclass(frozen=True)
class _Site:
    """A layer that is being solved and what its outputs meet."""

    step: Step
    place: Place
    behind: epilogue.Behind
    affine: epilogue.Affine
    stays: Tensor  # the original's outputs that the merged graph still has


class _Refit:
    def __init__(self, pair: Pair, batches: Sequence[Sequence[object]], settings: Settings) -> None:
        assert pair.merged is not None
        self.run_of, self.kept, self.settings = Lockstep(pair, batches, settings), pair.kept, settings
        self.original, self.merged, self.places = pair.original, pair.merged, Places(pair.merged)
        self.weights = self.places.weights
        facts, self.layers = pair.facts, {layer.node: layer for layer in pair.facts.layers}
        self.norms = {name: layer for name, layer in self.layers.items() if layer.op == "batch_norm"}
        used = Counter(layer.params["weight"] for layer in facts.layers if "weight" in layer.params)
        self.shared = {path for path, times in used.items() if times > 1}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.chains = chains(self.layers, list(self.merged.graph.nodes), self._lost, self.shared)
        self.used = self._affordable(batches) if self.chains else 0
        self.within = {layer.node: chain for chain in self.chains.values() for layer in chain.layers if self.used}

    def _lost(self, layer: Layer) -> bool:
        return layer.reads is not None and len(self.kept(layer.reads.flatten())) < layer.reads.numel()

    def _affordable(self, batches: Sequence[Sequence[object]]) -> int:
        flops = flops_by_node(self.merged, batches[0])
        total = sum(flops[layer.node] for chain in self.chains.values() for layer in chain.layers)
        device = self.weights[next(iter(self.chains.values())).layers[0].params["weight"]].device
        return joint.affordable(total, len(batches), device, self.settings.reduce)

    def run(self, stage: Callable[[str], None]) -> tuple[Refitted, ...]:
        moved: dict[str, bool] = {}  # node -> is its value in the merged graph another than the original's?
        records = []
        for step in self.run_of:
            node, layer = step.node, self.layers.get(step.node.name)
            comes = any(moved.get(source.name, False) for source in node.all_input_nodes)
            own = layer is not None and any(self._changed(path) for path in layer.params.values())
            moved[node.name] = comes or own
            if layer is not None and node.name in self.within:
                self._begin(step, layer, self.within[node.name])
            if layer is not None and comes and layer.op in epilogue.SOLVED:
                stage(f"refit {layer.module}")
                records.append(self._solve(step, layer))
            if layer is not None and node.name in self.chains:
                self.chains[node.name].end()
        self.merged.graph.lint()
        self.merged.recompile()  # a call that was given a bias fetches it in code that is not there yet
        return tuple(records)

    def _begin(self, step: Step, layer: Layer, chain: Chain) -> None:
        """At a chain's first layer its inputs are kept, unless there are too few positions."""
        if chain.nodes[0].name != step.node.name:
            return
        form, weight = self.places.form(step.node, layer), self.weights[layer.params["weight"]]
        count = 0.0 if form is None else float(sum(positions(y, form) for y in step.outputs[: self.used]))
        unknowns = 0 if form is None else rows_of(weight, form).size(2)
        if float(self.settings.reduce(weight.new_tensor(count, dtype=torch.float64))) >= joint.POSITIONS * unknowns > 0:
            chain.begin(self.run_of.merged.values[input_of(step.node, layer.op).name])
        else:
            self.within = {name: other for name, other in self.within.items() if other is not chain}

    def _changed(self, path: str) -> bool:
        before, now = at(self.original, path), at(self.merged, path)
        return before.shape != now.shape or not torch.equal(before, now)

    def _solve(self, step: Step, layer: Layer) -> Refitted:
        place = self.places.of(step.node, layer)
        if layer.params["weight"] in self.shared:
            return Refitted(layer.module, 0.0, 0.0, "as it is: one weight serves several calls")
        if place is None:
            return Refitted(layer.module, 0.0, 0.0, "as it is: a call of unknown geometry")
        if not all(isinstance(y, Tensor) and y.is_floating_point() for y in step.outputs):
            return Refitted(layer.module, 0.0, 0.0, "as it is: its outputs are no floating-point tensors")
        site, reduce = self._site(step, place), self.settings.reduce
        start, bias = place.start, place.bias
        count = enough(self.settings.rows, start.size(0) * start.size(2))
        if step.node.name in self.within:
            count = min(count, FEWEST)  # where the joint steps begin, no more
        index_of = sample(step.outputs, place.form, count, self.generator, reduce)
        rows = self._rows(site, index_of)
        scale = float(reduce(torch.stack([t.double().square().sum() for t in rows.targets]).sum()))
        judge = (site.affine, site.behind.rectified)
        before = error(rows, start, bias, *judge, reduce)
        if not isfinite(before) or not isfinite(scale):
            return Refitted(layer.module, 0.0, 0.0, "as it is: its inputs or outputs are not finite")
        if before <= EXACT * scale:
            return Refitted(layer.module, before / max(scale, 1e-300), before / max(scale, 1e-300), "exact as it is")
        wanted = self._output_moments(site) if site.behind.norm is not None else None
        rounds = 0 if step.node.name in self.within else ROUNDS  # what is fitted jointly needs none
        weight, offset = solution(rows, start, *judge, wanted, can_shift(layer), reduce, rounds)
        after = error(rows, weight, offset, *judge, reduce)
        note = ""
        if not after <= before:
            after, note = before, "as it is: no solution is better"
        else:
            self.places.write(place, weight, offset)
        if self._jointly(site):
            rows, now = self._rows(site, index_of), self.places.of(step.node, layer)
            assert now is not None
            after, note = error(rows, now.start, now.bias, *judge, reduce), ""
        return Refitted(layer.module, before / scale, after / scale, note)

    def _jointly(self, site: _Site) -> bool:
        """Fit the layer with the one that it reads, where nothing else does; the merged stream goes on with both."""
        chain = self.within.get(site.step.node.name)
        if chain is None or chain.nodes[-1] is not site.step.node or not chain.intact:
            return False
        places = []
        for layer in chain.layers:
            node = next(n for n in chain.nodes if n.name == layer.node)
            place = self.places.of(node, layer)
            if place is None:
                return False
            places.append(joint.Fitted(place.form, self.weights[layer.params["weight"]], self.places.bias(node, layer)))
        goals = [self._goal(site, number) for number in range(self._plenty(site))]
        better = joint.fit(self.run_of, chain, places, goals, self.settings.seed)
        if better:
            source = input_of(site.step.node, chain.layers[-1].op)
            self.run_of.merged.values[source.name] = [
                joint.along(self.run_of, chain, number) for number in range(len(chain.inputs))
            ]
        return better

    def _plenty(self, site: _Site) -> int:
        """So many batches have ENOUGH positions, or all that are used."""
        count = sum(positions(y, site.place.form) for y in site.step.outputs[: self.used])
        every = float(self.settings.reduce(site.affine.gain.new_tensor(float(count))))
        return max(1, min(self.used, round(self.used * joint.ENOUGH / max(every, 1.0))))

    def _site(self, step: Step, place: Place) -> _Site:
        found = epilogue.behind(self.merged, step.node, self.norms, self._present())
        layer = place.layer
        out_labels = layer.writes if layer.writes is not None else layer.carries
        assert out_labels is not None
        stays = self.kept(out_labels).to(step.outputs[0].device)
        return _Site(step, place, found, self._affine(step.node, found, step.outputs, stays), stays)

    def _present(self) -> set[str]:
        return set(self.run_of.merged.values) & set(self.run_of.original.values)

    def _affine(
        self, node: fx.Node, found: epilogue.Behind, outputs: Sequence[Tensor], stays: Tensor
    ) -> epilogue.Affine:
        """What the BatchNorm behind a layer does to the channels that stay."""
        ones = torch.ones(len(stays), dtype=torch.float64, device=stays.device)
        if found.norm is None:
            shift = self.run_of.shifts.get(node.name)
            return epilogue.affine(ones, torch.zeros_like(ones) if shift is None else shift[stays])
        gain, constant = line(self.original, found.norm, *self.run_of.statistics(found.norm, outputs))
        return epilogue.affine(gain[stays], constant[stays])

    def _rows(self, site: _Site, index_of: Sequence[Tensor]) -> Rows:
        """The output positions chosen of each batch."""
        source = input_of(site.step.node, site.place.layer.op)
        inputs = self.run_of.merged.values[source.name]
        sampled = [patches(x, site.place.form, index) for x, index in zip(inputs, index_of, strict=True)]
        return Rows(sampled, *self._targets(site, index_of))

    def _targets(self, site: _Site, index_of: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """What the layer ought to put out there, corrected by the other stream, and the merged graph's other stream."""
        wanted, others, form, stays = [], [], site.place.form, site.stays
        other = site.behind.other
        for number, (y, index) in enumerate(zip(site.step.outputs, index_of, strict=True)):
            target = at_positions(y, form, index)[:, stays]
            now = None
            if other is not None:
                streams = self.run_of.original.values[other.name][number], self.run_of.merged.values[other.name][number]
                if streams[0].shape == y.shape:
                    before, now = at_positions(streams[0], form, index)[:, stays], at_positions(streams[1], form, index)
                    target = aims.residual(target, site.affine, before, now)
            wanted.append(target)
            others.append(now)
        return wanted, others

    def _goal(self, site: _Site, number: int) -> targets.Goal:
        """What the layer's outputs ought to come to behind what they meet next, for one batch."""
        wanted, other = site.step.outputs[number], site.behind.other
        axis = channel_axis(wanted, site.place.form)
        view = [-1 if a == axis else 1 for a in range(wanted.dim())]
        wanted = wanted.index_select(axis, site.stays)
        gain, constant = (t.to(wanted).view(view) for t in (site.affine.gain, site.affine.constant))
        wanted = torch.addcmul(constant, wanted, gain)
        offset = constant.expand_as(wanted)
        if other is not None:
            before, now = (run.values[other.name][number] for run in (self.run_of.original, self.run_of.merged))
            if now.shape == wanted.shape:
                wanted, offset = wanted + before.index_select(axis, site.stays), offset + now
        return targets.Goal(gain, offset, wanted, site.behind.rectified)

    def _output_moments(self, site: _Site) -> tuple[Tensor, Tensor]:
        """Mean and variance of what the original puts out: (o,), (o,)."""
        outputs = site.step.outputs
        mean, variance = moments(outputs, channel_axis(outputs[0], site.place.form), self.settings.reduce)
        return mean[site.stays], variance[site.stays]
