"""Refit: the layers after the first merged group are re-solved, so that their outputs are close to the original's.

The original and the merged graph run in lockstep. At each linear layer or convolution of the merged graph whose input
is no longer the original's, in execution order:

    P   patches of the merged graph's input of this layer, at a sample of its output positions
    T   the original's outputs there, of the channels that stay, corrected as `targets` defines
    W'  argmin |P W' - T|^2 + ridge |W' - W0|^2, W0 the current weights        (see `solve`)

The merged graph then continues with W'. Both consumers that lost channels and producers whose input has changed are
solved. Before a BatchNorm, the mean and the standard deviation of its input are then matched to the original's, channel
by channel. Consumers that lost channels are then fitted once more together with the producers, if no other layer reads
these (see `joint`). A weight that serves several calls is solved on the rows of all of them (see `shared`). A layer is
left unchanged where its outputs are the original's already, and where no solution is better than the current weights
on samples that were held out of the solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from fxmerge.calibration.decided import is_routed, rows_of
from fxmerge.calibration.epilogue import SOLVED
from fxmerge.calibration.held_out import samples
from fxmerge.calibration.paired_run import Pair, PairedRun, Settings, Visit
from fxmerge.calibration.patches import FEWEST, enough, sample
from fxmerge.calibration.sample_run import idle
from fxmerge.calibration.tail import shaped
from fxmerge.calibration.work import SOLVES, shares_of_work
from fxmerge.graph.cost import flops_by_node
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.provenance import Layer, batch_norms, can_shift
from fxmerge.progress import Stage, silent
from fxmerge.refit import joint
from fxmerge.refit.experts import Experts
from fxmerge.refit.joint_steps import JointSteps
from fxmerge.refit.layer_weights import GraphWeights, LayerWeights
from fxmerge.refit.records import EXACTLY, NO_BETTER, TOO_FEW, Refitted
from fxmerge.refit.recurrent import Recurrent
from fxmerge.refit.regions import regions
from fxmerge.refit.shared import COSTLY, Gathered, Shared, shared_weights
from fxmerge.refit.sites import Site, Sites
from fxmerge.refit.solve import FEW, ROUNDS, Problem, Rows, relative_error
from fxmerge.weights.by_path import at

EXACT = 1e-10  # the relative square error below which a layer needs no refit


def refit(
    pair: Pair,
    batches: Sequence[Sequence[object]],
    settings: Settings,
    stage: Stage = silent,
    jointly: bool = True,
) -> tuple[Refitted, ...]:
    """Re-solve the layers of the pair's merged graph in place. Returns a record of each layer.

    batches: by batch, the values of the graph's placeholders
    jointly: whether to fit layers together too; each alone is a faster trial

    The cost is two forward passes, a product (p, rows) (rows, p) for each layer with p weights for each output, and
    `joint.PASSES` forward passes of the merged layers that are fitted jointly, within `joint.BUDGET`.
    """
    assert pair.merged is not None
    with evaluating(pair.original, pair.merged), torch.no_grad():
        return _Refit(pair, batches, settings, jointly).run(stage)


class _Refit:
    def __init__(self, pair: Pair, batches: Sequence[Sequence[object]], settings: Settings, jointly: bool) -> None:
        assert pair.merged is not None
        self.pair, self.batches, self.kept, self.settings = pair, batches, pair.kept, settings
        self.original, self.merged, self.weights = pair.original, pair.merged, GraphWeights(pair.merged)
        facts, self.layers = pair.facts, {layer.node: layer for layer in pair.facts.layers}
        self.norms = batch_norms(facts)
        self.shared = shared_weights(facts.layers, self.merged.graph)
        self.recurrent: dict[str, list[Layer]] = {}  # networks that are called once, by node
        for layer in facts.layers:
            if layer.operation.is_recurrent and layer.params["weight"] not in self.shared:
                self.recurrent.setdefault(layer.node, []).append(layer)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.records: dict[str, Refitted] = {}  # by node
        self.ridges: dict[str, float] = {}  # of the layers that have been solved, by node
        self.idle, total = idle(batches), sum(map(samples, batches))
        self.done = shares_of_work(facts, pair.original, total, settings, SOLVES)
        nodes = list(self.merged.graph.nodes)
        found = regions(self.layers, nodes, self._lost, self.shared, self.idle) if jointly else []
        self.joint = JointSteps(found, self.weights, batches, settings, self.ridges)
        self._start()

    def _start(self) -> None:
        """Begins a run of both graphs, with the weights as they are now."""
        self.paired = PairedRun(self.pair, self.batches, self.settings, decided=True)
        self.sites = Sites(self.paired, self.norms)
        self.experts = Experts(self.paired, self.settings, EXACT)
        self.networks = Recurrent(self.paired, self.settings, EXACT)
        for name in self.layers:
            index = rows_of(self.paired.original.named[name], self.pair.facts)
            if index is not None:
                self.paired.original.keep([index.name], name)
        self.joint.start(self.paired, self.sites)

    def _lost(self, layer: Layer) -> bool:
        return layer.reads is not None and len(self.kept(layer.reads.flatten())) < layer.reads.numel()

    def run(self, stage: Stage) -> tuple[Refitted, ...]:
        self.moved = self._moved()
        self.together = self._together()
        while not self._through(stage):
            self._start()
        self.merged.graph.lint()
        self.merged.recompile()  # where a call was given a bias, the graph's code does not have it yet
        order = [node.name for node in self.merged.graph.nodes]
        return tuple(self.records[name] for name in order if name in self.records)

    def _moved(self) -> dict[str, bool]:
        """By node: whether its input in the merged graph differs from the original's."""
        comes: dict[str, bool] = {}
        gives: dict[str, bool] = {}
        for node in self.merged.graph.nodes:
            layer = self.layers.get(node.name)
            moved = any(gives.get(source.name, False) for source in node.all_input_nodes)
            comes[node.name] = node.name in self.pair.starts or moved
            own = comes[node.name] or (layer is not None and any(map(self._changed, layer.params.values())))
            gives[node.name] = node.name not in self.idle and own
        return comes

    def _together(self) -> dict[str, Shared]:
        """The shared weights that are solved, by node: those with a moved input, as many as BUDGET allows runs for."""
        found: dict[str, Shared] = {}
        able = [s for s in self.shared.values() if not s.reason and any(self.moved[call] for call in s.calls)]
        able = [s for s in able if self.layers[s.calls[0]].op in SOLVED]
        if not able:
            return found
        flops = float(sum(flops_by_node(self.original, self.batches[0]).values())) * 2 * len(self.batches)
        device = self.weights.weight(self.layers[able[0].calls[0]]).device
        total = float(self.settings.reduce(torch.tensor(flops, dtype=torch.float64, device=device)))
        for shared in able[: int(joint.BUDGET / max(total, 1.0))]:
            found |= dict.fromkeys(shared.calls, shared)
        return found

    def _through(self, stage: Stage) -> bool:
        """One run of both graphs, until a shared weight is solved. Returns whether it has reached the end."""
        gathered: Gathered | None = None
        for visit in self.paired:
            node, layer = visit.node, self.layers.get(visit.node.name)
            self.joint.reach(visit, layer)
            if layer is None:
                continue
            shared = self.together.get(node.name)
            if shared is not None and gathered is None and shared.calls[-1] not in self.records:
                gathered = Gathered(shared)
            if gathered is not None and shared is gathered.shared:
                stage(f"refit {layer.module}", self.done[layer.node])
                if self._gathers(gathered, visit, layer):
                    return False
            elif shared is None and self._is_due(node.name, gathered):
                stage(f"refit {layer.module}", self.done[layer.node])
                self.records |= self._solve(visit, layer)
        return True

    def _is_due(self, node: str, gathered: Gathered | None) -> bool:
        """Whether a layer is solved in this run: not before a shared weight that it depends on."""
        waits = gathered is not None and node in gathered.shared.after
        layer, own = self.layers[node], self.recurrent.get(node, ())
        able = layer.op in SOLVED or is_routed(layer, self.pair.facts) or bool(own)
        moved = self.moved[node] or any(self._changed(path) for part in own for path in part.params.values())
        return moved and able and node not in self.records and not waits

    def _changed(self, path: str) -> bool:
        before, now = at(self.original, path), at(self.merged, path)
        return before.shape != now.shape or not torch.equal(before, now)

    def _solve(self, visit: Visit, layer: Layer) -> dict[str, Refitted]:
        """Solve a layer; also a region that ends with it. Returns the records, by node."""
        held, node = self.weights.of(visit.node, layer), visit.node.name
        if layer.params["weight"] in self.shared:
            return {node: Refitted(layer.module, 0.0, 0.0, self.shared[layer.params["weight"]].reason or COSTLY)}
        if node in self.recurrent:
            return {node: self.networks.solve(visit.node, self.recurrent[node])}
        if layer.is_stacked:
            return {node: self.experts.solve(visit, layer, self.weights.weight(layer), self.generator)}
        if why := self._unsolvable(visit, held):
            return {node: Refitted(layer.module, 0.0, 0.0, why)}
        assert held is not None
        site = self.sites.site(visit, layer, held)
        index_of = self._sampled(site, 1)
        rows = self.sites.rows(site, index_of)
        wanted = self.sites.output_moments(site) if site.epilogue.norm is not None else None
        found = self._improved([site], rows, wanted)
        return self.joint.solved(site, index_of, rows, found) if found.solved else {node: found}

    def _unsolvable(self, visit: Visit, held: LayerWeights | None) -> str:
        """Why a layer cannot be solved, or ""."""
        if held is None:
            return "unchanged: the geometry of the call is unknown"
        if held.weight.is_complex() or any(isinstance(y, Tensor) and y.is_complex() for y in shaped(visit.outputs)):
            return "unchanged: it is complex"
        if not all(isinstance(y, Tensor) and y.is_floating_point() for y in shaped(visit.outputs)):
            return "unchanged: its outputs are not floating-point tensors"
        return ""

    def _sampled(self, site: Site, calls: int) -> list[Tensor]:
        """The output positions that a layer is solved on, by batch; a share of them if its weight has several calls."""
        shape = site.held.matrices.shape
        count = enough(self.settings.rows, shape[0] * shape[2], self.settings.memory)
        if site.visit.node.name in self.joint.within:
            count = min(count, FEWEST)  # enough for the weights that joint steps start from
        outputs, form = shaped(site.visit.outputs), site.held.form
        real = self.paired.real(site.visit.node.name, outputs, form)
        return sample(outputs, form, -(-count // calls), self.generator, self.settings.reduce, real)

    def _error(self, rows: Rows, weight: Tensor, bias: Tensor) -> float:
        """The relative square error of a layer's outputs at these positions."""
        return relative_error(rows, weight, bias, self.settings.reduce)

    def _improved(self, sites: Sequence[Site], rows: Rows, wanted: tuple[Tensor, Tensor] | None) -> Refitted:
        """Solve the weight of these sites on rows of all of them, and write it where it is better on those held out."""
        layer, held, node = sites[0].layer, sites[0].held, sites[0].visit.node.name
        start, bias = held.matrices, held.offsets
        reduce, judging = self.settings.reduce, rows.judging
        plenty = judging.count(reduce) >= FEW
        whole = self._error(judging if plenty else rows, start, bias)
        if not isfinite(whole):
            return Refitted(layer.module, 0.0, 0.0, "unchanged: its inputs or outputs are not finite")
        if whole <= EXACT:
            return Refitted(layer.module, whole, whole, EXACTLY)
        if not judging.count(reduce):
            return Refitted(layer.module, whole, whole, TOO_FEW)
        found = Problem(
            rows=rows,
            start=start,
            bias=bias,
            wanted=wanted,
            centred=can_shift(layer),
            reduce=reduce,
            rounds=0 if node in self.joint.within else ROUNDS,  # layers that are fitted jointly need none
        ).best()
        self.ridges[node] = found.ridge
        before, after = found.before, found.after
        if not after < before:
            return Refitted(layer.module, before, before, NO_BETTER)
        for site in sites:
            self.weights.write(site.visit.node, site.layer, found.weight, found.bias)
        return Refitted(layer.module, before, after)

    def _gathers(self, gathered: Gathered, visit: Visit, layer: Layer) -> bool:
        """Take the rows of one call of a shared weight, and solve it at the last call. Returns whether it was done."""
        held, name = self.weights.of(visit.node, layer), gathered.shared.calls[-1]
        if why := self._unsolvable(visit, held):
            self.records[name] = Refitted(layer.module, 0.0, 0.0, why)
            return True
        assert held is not None
        site = self.sites.site(visit, layer, held)
        gathered.sites.append(site)
        gathered.rows.append(self.sites.rows(site, self._sampled(site, len(gathered.shared.calls))))
        gathered.moments.append(self.sites.output_moments(site))
        if visit.node.name != name:
            return False
        self.records[name] = self._improved(gathered.sites, gathered.whole, gathered.output_moments)
        return True
