"""Refit: the layers after the first merged group are re-solved, so that their outputs are close to the original's.

The original and the merged graph run in lockstep. At each linear layer or convolution of the merged graph whose input
is no longer the original's, in execution order:

    P   patches of the merged graph's input of this layer, at a sample of its output positions
    T   the original's outputs there, of the channels that stay, corrected as `targets` defines
    W'  argmin |P W' - T|^2 + ridge |W' - W0|^2, W0 the current weights        (see `solve`)

The merged graph then continues with W'. Both consumers that lost channels and producers whose input has changed are
solved. Before a BatchNorm, the mean and the standard deviation of its input are then matched to the original's, channel
by channel. A consumer that lost channels is then fitted once more together with their producer, if no other layer reads
them (see `joint`). A layer is left unchanged where its outputs are the original's already, where one weight serves
several calls, and where no solution is better than the current weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from fxmerge.calibration.epilogue import SOLVED, Affine, Epilogue, affine, epilogue_of
from fxmerge.calibration.paired_run import Pair, PairedRun, Settings, Visit, line, moments
from fxmerge.calibration.patches import (
    FEWEST,
    at_positions,
    channel_axis,
    enough,
    held_out,
    input_of,
    matrices_of,
    patches,
    positions,
    sample,
)
from fxmerge.graph.cost import flops_by_node
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.provenance import Layer, batch_norms, can_shift
from fxmerge.refit import joint
from fxmerge.refit.chains import Chain, chains
from fxmerge.refit.layer_weights import GraphWeights, LayerWeights
from fxmerge.refit.solve import ROUNDS, Problem, Rows, error
from fxmerge.refit.targets import Target
from fxmerge.weights.by_path import at

EXACT = 1e-10  # the relative square error below which a layer needs no refit


@dataclass(frozen=True)
class Refitted:
    """What refit did to one layer: the relative square error of its outputs before and after, on samples that were held
    out of the solve, and why it was left unchanged, or "".
    """

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
    """Re-solve the layers of the pair's merged graph in place. Returns a record of each layer.

    batches: by batch, the values of the graph's placeholders

    The cost is two forward passes, a product (p, rows) (rows, p) for each layer with p weights for each output, and
    `joint.PASSES` forward passes of the merged layers that are fitted jointly, within `joint.BUDGET`.
    """
    assert pair.merged is not None
    with evaluating(pair.original, pair.merged), torch.no_grad():
        return _Refit(pair, batches, settings).run(stage)


@dataclass(frozen=True, kw_only=True)
class _Site:
    """A layer that is being solved, and its epilogue."""

    visit: Visit
    layer: Layer
    held: LayerWeights
    epilogue: Epilogue
    affine: Affine
    stays: Tensor  # the indices of the original's output channels that the merged graph still has


class _Refit:
    def __init__(self, pair: Pair, batches: Sequence[Sequence[object]], settings: Settings) -> None:
        assert pair.merged is not None
        self.paired, self.kept, self.settings = PairedRun(pair, batches, settings), pair.kept, settings
        self.original, self.merged, self.weights = pair.original, pair.merged, GraphWeights(pair.merged)
        facts, self.layers = pair.facts, {layer.node: layer for layer in pair.facts.layers}
        self.norms = batch_norms(facts)
        used = Counter(layer.params["weight"] for layer in facts.layers if "weight" in layer.params)
        self.shared = {path for path, times in used.items() if times > 1}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.chains = chains(self.layers, list(self.merged.graph.nodes), self._lost, self.shared)
        self.used = self._affordable(batches) if self.chains else 0  # batches that joint steps are run on
        self.chains = self.chains if self.used else {}
        self.starts = {chain.nodes[0].name: chain for chain in self.chains.values()}
        self.within = {layer.node for chain in self.chains.values() for layer in chain.layers}

    def _lost(self, layer: Layer) -> bool:
        return layer.reads is not None and len(self.kept(layer.reads.flatten())) < layer.reads.numel()

    def _affordable(self, batches: Sequence[Sequence[object]]) -> int:
        flops = flops_by_node(self.merged, batches[0])
        total = sum(flops[layer.node] for chain in self.chains.values() for layer in chain.layers)
        device = self._weight(next(iter(self.chains.values())).layers[0]).device
        return joint.affordable(total, len(batches), device, self.settings.reduce)

    def _weight(self, layer: Layer) -> Tensor:
        return self.weights.weights[layer.params["weight"]]

    def run(self, stage: Callable[[str], None]) -> tuple[Refitted, ...]:
        moved: dict[str, bool] = {}  # node -> does its value in the merged graph differ from the original's?
        records = []
        for visit in self.paired:
            node, layer = visit.node, self.layers.get(visit.node.name)
            comes = any(moved.get(source.name, False) for source in node.all_input_nodes)
            own = layer is not None and any(self._changed(path) for path in layer.params.values())
            moved[node.name] = comes or own
            if layer is not None and comes and layer.op in SOLVED:
                stage(f"refit {layer.module}")
                records.append(self._solve(visit, layer))
            if layer is not None and node.name in self.chains:
                self.chains[node.name].end()
            if layer is not None and node.name in self.starts:  # after a chain that ends here has been fitted
                self._begin(visit, layer, self.starts[node.name])
        self.merged.graph.lint()
        self.merged.recompile()  # where a call was given a bias, the graph's code does not have it yet
        return tuple(records)

    def _begin(self, visit: Visit, layer: Layer, chain: Chain) -> None:
        """Keep the inputs of a chain's first layer, unless there are too few positions."""
        form, weight = self.weights.form(visit.node, layer), self._weight(layer)
        count = 0.0 if form is None else float(sum(positions(y, form) for y in visit.outputs[: self.used]))
        unknowns = 0 if form is None else matrices_of(weight, form).size(2)
        if float(self.settings.reduce(weight.new_tensor(count, dtype=torch.float64))) >= joint.POSITIONS * unknowns > 0:
            chain.begin(self.paired.merged.values[input_of(visit.node, layer.op).name])
        else:
            del self.chains[chain.nodes[-1].name]
            self.within = {layer.node for other in self.chains.values() for layer in other.layers}

    def _changed(self, path: str) -> bool:
        before, now = at(self.original, path), at(self.merged, path)
        return before.shape != now.shape or not torch.equal(before, now)

    def _solve(self, visit: Visit, layer: Layer) -> Refitted:
        held = self.weights.of(visit.node, layer)
        if layer.params["weight"] in self.shared:
            return Refitted(layer.module, 0.0, 0.0, "unchanged: one weight serves several calls")
        if held is None:
            return Refitted(layer.module, 0.0, 0.0, "unchanged: the geometry of the call is unknown")
        if not all(isinstance(y, Tensor) and y.is_floating_point() for y in visit.outputs):
            return Refitted(layer.module, 0.0, 0.0, "unchanged: its outputs are not floating-point tensors")
        site, reduce = self._site(visit, layer, held), self.settings.reduce
        start, bias = held.matrices, held.offsets
        count = enough(self.settings.rows, start.size(0) * start.size(2))
        if visit.node.name in self.within:
            count = min(count, FEWEST)  # enough for the weights that joint steps start from
        index_of = sample(visit.outputs, held.form, count, self.generator, reduce)
        rows = self._rows(site, index_of)
        whole, energy = error(rows, start, bias, reduce), rows.energy(reduce)
        if not isfinite(whole) or not isfinite(energy):
            return Refitted(layer.module, 0.0, 0.0, "unchanged: its inputs or outputs are not finite")
        if whole <= EXACT * energy:
            return Refitted(layer.module, whole / max(energy, 1e-300), whole / max(energy, 1e-300), "unchanged: exact")
        judges = held_out(visit.outputs, held.form, index_of, reduce)
        if float(reduce(start.new_tensor(float(sum(int(j.sum()) for j in judges))))) == 0:
            return Refitted(layer.module, whole / energy, whole / energy, "unchanged: too few output positions")
        judging = rows.only(judges)
        before, scale = error(judging, start, bias, reduce), max(judging.energy(reduce), 1e-300)
        found = Problem(
            rows=rows,
            solved=rows.only([~j for j in judges]),
            judging=judging,
            start=start,
            wanted=self._output_moments(site) if site.epilogue.norm is not None else None,
            centred=can_shift(layer),
            reduce=reduce,
            rounds=0 if visit.node.name in self.within else ROUNDS,  # layers that are fitted jointly need none
        ).best()
        after, note = found.error, ""
        if not after < before:
            after, note = before, "unchanged: no solution is better on samples held out of it"
        else:
            self.weights.write(visit.node, layer, found.weight, found.bias)
        if self._jointly(site):
            now = self.weights.of(visit.node, layer)
            assert now is not None
            after, note = error(self._rows(site, index_of).only(judges), now.matrices, now.offsets, reduce), ""
        return Refitted(layer.module, before / scale, after / scale, note)

    def _jointly(self, site: _Site) -> bool:
        """Fit the layer together with its producer, if it ends a chain; the merged graph then continues with both."""
        chain = self.chains.get(site.visit.node.name)
        if chain is None or not chain.intact:
            return False
        weights = []
        for layer in chain.layers:
            held = self.weights.of(next(n for n in chain.nodes if n.name == layer.node), layer)
            if held is None:
                return False
            weights.append(held)
        targets = (self._target(site, number) for number in range(self._plenty(site)))
        better = joint.fit(self.paired, chain, weights, targets, self.settings.seed)
        if better:
            source = input_of(site.visit.node, chain.layers[-1].op)
            self.paired.merged.values[source.name] = [
                joint.along(self.paired, chain, number) for number in range(len(chain.inputs))
            ]
        return better

    def _plenty(self, site: _Site) -> int:
        """The number of batches that have ENOUGH positions, or of all that are used."""
        count = sum(positions(y, site.held.form) for y in site.visit.outputs[: self.used])
        every = float(self.settings.reduce(site.affine.gain.new_tensor(float(count))))
        return max(1, min(self.used, round(self.used * joint.ENOUGH / max(every, 1.0))))

    def _site(self, visit: Visit, layer: Layer, held: LayerWeights) -> _Site:
        found = epilogue_of(self.merged, visit.node, self.norms, self._present())
        out_labels = layer.writes if layer.writes is not None else layer.carries
        assert out_labels is not None
        stays = self.kept(out_labels).to(visit.outputs[0].device)
        step = self._affine(visit, found, stays)
        return _Site(visit=visit, layer=layer, held=held, epilogue=found, affine=step, stays=stays)

    def _present(self) -> set[str]:
        return set(self.paired.merged.values) & set(self.paired.original.values)

    def _affine(self, visit: Visit, found: Epilogue, stays: Tensor) -> Affine:
        """The affine map of a layer's BatchNorm, or of the shift of its outputs, for the channels that stay."""
        ones = torch.ones(len(stays), dtype=torch.float64, device=stays.device)
        if found.norm is None:
            shift = self.paired.shifts.get(visit.node.name)
            return affine(ones, torch.zeros_like(ones) if shift is None else shift[stays])
        mean, deviation = self.paired.statistics(found.norm, visit.outputs)
        gain, constant = line(self.original, found.norm, mean, deviation)
        return affine(gain[stays], constant[stays])

    def _rows(self, site: _Site, index_of: Sequence[Tensor]) -> Rows:
        """The patches and the targets at these output positions of each batch."""
        source = input_of(site.visit.node, site.layer.op)
        inputs = self.paired.merged.values[source.name]
        sampled = [patches(x, site.held.form, index) for x, index in zip(inputs, index_of, strict=True)]
        return Rows(sampled, [self._target(site, number, index) for number, index in enumerate(index_of)])

    def _target(self, site: _Site, number: int, index: Tensor | None = None) -> Target:
        """The target of the layer's outputs for one batch, at these positions or everywhere."""
        outputs, form, other = site.visit.outputs[number], site.held.form, site.epilogue.other
        axis = 1 if index is not None else channel_axis(outputs, form)

        def chosen(values: Tensor) -> Tensor:
            return values if index is None else at_positions(values, form, index)

        streams = None
        if other is not None:
            before, now = (run.values[other.name][number] for run in (self.paired.original, self.paired.merged))
            if before.shape == outputs.shape:
                streams = chosen(before).index_select(axis, site.stays), chosen(now)
        return Target(
            outputs=chosen(outputs).index_select(axis, site.stays),
            axis=axis,
            affine=site.affine,
            bounds=site.epilogue.bounds,
            streams=streams,
        )

    def _output_moments(self, site: _Site) -> tuple[Tensor, Tensor]:
        """The mean and the variance of the original's outputs, of the channels that stay: (o,), (o,)."""
        outputs = site.visit.outputs
        mean, variance = moments(outputs, channel_axis(outputs[0], site.held.form), self.settings.reduce)
        return mean[site.stays], variance[site.stays]
