"""A paired run: the original and the merged graph run node by node, in lockstep, on the same batches.

The value of a node is a list with one entry for each batch, so that all batches are seen at one node before the next
node runs. Values are freed after their last use; of large ones, some are not stored (see `tail` and `waists`).

On probes, both streams are *held* where training left them, whatever the model's inputs look like: every BatchNorm uses
the mean and variance of the *original's* input over all batches, so that its output has mean beta and deviation gamma.
In a network without norms, each rectified layer is held instead: its outputs are shifted, channel by channel, so that
a share FIRING of the original's outputs is positive. Trained units fire seldom; a linear map of noise fires half the
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.decided import as_decided, decisions
from fxmerge.calibration.held_out import sample_folds, samples
from fxmerge.calibration.padding import Padding
from fxmerge.calibration.patches import Form, positions
from fxmerge.calibration.sample_run import SampleRun, narrowed
from fxmerge.calibration.stream import Stream, Values
from fxmerge.calibration.tail import tail
from fxmerge.calibration.waists import Between, between
from fxmerge.calibration.words import word_counts
from fxmerge.graph.nested import fresh
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.methods.least_squares import Reduce
from fxmerge.weights.by_path import at

FIRING = 0.1  # the share of a held layer's outputs that is positive, if they are Gaussian
LEVEL = NormalDist().inv_cdf(FIRING)  # the mean of these outputs, in standard deviations


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How batches are run, and how many rows a layer is solved on.

    rows:    output positions that a layer is solved on, at most
    seed:    of the sampling
    held:    True to hold both streams where training left them (probes), False to run them as they are (data)
    reduce:  sums a tensor over all processes
    made:    the number of leading batches whose samples may be held out to judge solves, or 0 for all
    padding: which positions of the batches are no rows
    memory:  GiB that bound the rows of wide layers, or 0
    """

    rows: int
    seed: int
    held: bool
    reduce: Reduce
    made: int = 0
    padding: Padding | None = None
    memory: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The original graph and the merged graph, or the original alone.

    facts:      the provenance of the original; without some of its residual branches, if the merged graph lacks them
    rectified:  the layers that are held in a network without norms, by node
    alive:      (label_count,) which channels the merged graph still has, as `ir.groups.survivors` returns it
    beyond:     the layers that the original alone has
    starts:     the nodes of the merged graph that read other values than those of the same names in the original
    free:       the BatchNorms that are not held: of rotated channels, the statistics are known to be about right only
    """

    original: fx.GraphModule
    facts: Provenance
    rectified: Mapping[str, Layer]
    merged: fx.GraphModule | None = None
    alive: Tensor | None = None
    beyond: tuple[Layer, ...] = ()
    starts: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()

    def kept(self, labels: Tensor) -> Tensor:
        """The positions in labels (m,) of the channels that the merged graph still has."""
        return torch.arange(len(labels)) if self.alive is None else self.alive[labels].nonzero().flatten()


@dataclass(frozen=True)
class Visit:
    """A node that a paired run has reached: the original has run it, the merged graph is about to."""

    node: fx.Node  # of the merged graph, where there is one
    outputs: Values  # the original's; those of a layer that is held, before the shift


class PairedRun:
    """Runs the graphs of a pair, whose nodes have the same names, side by side. Iterating yields a `Visit` for each
    node that both graphs have, in the order of the merged graph.
    """

    def __init__(
        self, pair: Pair, batches: Sequence[Sequence[Any]], settings: Settings, *, decided: bool = False
    ) -> None:
        """decided: whether the merged graph sends its rows to the experts that the original chooses"""
        self.layers = (*pair.facts.layers, *pair.beyond)
        norms = {la.node: la for la in self.layers if la.op == "batch_norm" and la.node not in pair.free}
        self.norms = norms if settings.held else {}
        self.rectified: Mapping[str, Layer] = pair.rectified if settings.held else {}
        self.recorded = any(isinstance(batch, SampleRun) for batch in batches)
        self.facts, self.alive = pair.facts, pair.alive
        self.original = self._stream(pair.original, batches)
        self.merged = self.original if pair.merged is None else self._stream(pair.merged, batches)
        self.decided = decisions(pair.original, pair.facts) if decided else frozenset[str]()
        self.shifts: dict[str, Tensor] = {}  # held layer -> what is added to its outputs, (c,)
        self.kept, self.reduce, self.padding = pair.kept, settings.reduce, settings.padding
        self.words = word_counts(pair.original, pair.facts)
        self.folds = sample_folds([samples(batch) for batch in batches], settings.made)
        self.known: dict[str, tuple[Tensor, Tensor]] = {}  # BatchNorm -> mean and deviation over the batches

    def _stream(self, module: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> Stream:
        layers = {layer.node for layer in self.layers}
        # of a recorded graph, what is compared is not at its end
        ends = frozenset() if self.recorded else tail(module, layers).difference(self.norms, self.rectified)
        held = {*self.norms, *self.rectified, *ends}
        inner = Between() if self.recorded else between(module, self.facts.kinds, held)
        return Stream(module, fresh(list(batches)), ends, inner)

    def __iter__(self) -> Iterator[Visit]:
        if self.merged is self.original:
            for node in self.original.nodes:
                yield Visit(node, self._run(self.original, node, None))
                self.original.free(node.name)
            return
        ahead = iter(self.original.nodes)
        for node in self.merged.nodes:
            if node.name in self.original.named:
                for twin in ahead:
                    outputs = self._run(self.original, twin, None)
                    if twin.name == node.name:
                        break
                    self.original.free(twin.name)
                yield Visit(node, outputs)
                del outputs
                self.original.free(node.name)
            self._run(self.merged, node, self.kept)
            self.merged.free(node.name)

    def real(self, node: str, outputs: Sequence[Tensor], form: Form, first: int = 0) -> list[Tensor | None]:
        """Which output positions of a layer are not padding, (positions,) bool by batch; None for all of them.

        first: the number of the first batch
        """
        if self.padding is None or form.spatial:
            return [None] * len(outputs)
        found = [self.padding.real(node, self.original.batches[i], y.shape) for i, y in enumerate(outputs, first)]
        counts = [positions(y, form) for y in outputs]
        return [
            None if real is None else real.flatten().repeat_interleave(count // real.numel())
            for real, count in zip(found, counts, strict=True)
        ]

    def unpadded(self, node: str, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The values of a node for each batch, without padding."""
        if self.padding is None:
            return list(outputs)
        return [self.padding.of(node, self.original.batches[i], y) for i, y in enumerate(outputs)]

    def statistics(self, layer: Layer, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the original's BatchNorm subtracts and divides by for these inputs: (c,), (c,), float64."""
        if layer.node not in self.norms and layer.has_running_statistics:
            module = self.original.module
            mean, variance = (at(module, layer.params[s]).double() for s in ("running_mean", "running_var"))
        else:
            mean, variance = moments(inputs, 1, self.reduce)
        return mean, (variance + layer.eps).sqrt()

    def again(self, node: fx.Node, given: Mapping[str, Any], number: int) -> Any:
        """The value of a node of the merged graph for one batch, with these values for those of its operands; that of
        a layer that is held, before the shift.
        """
        if node.name in self.norms:
            source = node.all_input_nodes[0].name
            value = given[source] if source in given else self.merged.values[source][number]
            return self._normalise(self.merged, [value], self.norms[node.name], self.kept)[0]
        return self.merged.call(node, number, given)

    def shifted(self, node: fx.Node, value: Any) -> Any:
        """A value of the merged graph after the shift, if the node is a layer that is held."""
        layer = self.rectified.get(node.name)
        return value if layer is None else self._held([value], layer, self.kept)[0]

    def advance(self, node: fx.Node) -> Values:
        """Runs a node of the original alone, and frees nothing."""
        return self._run(self.original, node, None)

    def _run(self, stream: Stream, node: fx.Node, kept: Callable[[Tensor], Tensor] | None) -> Values:
        if node.name in self.norms:
            values = self._normalise(stream, stream.values[node.all_input_nodes[0].name], self.norms[node.name], kept)
        else:
            values = stream.every(node)
            if kept is not None and node.name in self.decided:
                taken = stream.values[node.all_input_nodes[0].name], values, self.original.values[node.name]
                values = [as_decided(node, *of_batch) for of_batch in zip(*taken, strict=True)]
            if kept is not None and self.recorded:
                values = [self._narrowed(node, value, run) for value, run in zip(values, stream.batches, strict=True)]
        layer = self.rectified.get(node.name)
        stream.values[node.name] = values if layer is None else self._held(values, layer, kept)
        return values

    def _narrowed(self, node: fx.Node, value: Any, run: Sequence[Any]) -> Any:
        """What the user's own code makes in the merged model of a value that it makes as wide as channels."""
        labels = self.facts.labels.get(node.name)
        if value is None or labels is None or self.alive is None:
            return value
        if not isinstance(run, SampleRun) or node.name not in run.idle:
            return value
        return narrowed(value, labels, self.alive)

    def _held(self, values: Values, layer: Layer, kept: Callable[[Tensor], Tensor] | None) -> Values:
        axis = axis_of_outputs(values[0], at(self.original.module, layer.params["weight"]))
        if kept is None:
            mean, variance = moments(values, axis, self.reduce)
            self.shifts[layer.node] = LEVEL * variance.sqrt() - mean
        shift, labels = self.shifts[layer.node], layer.writes if layer.writes is not None else layer.carries
        if kept is not None and labels is not None:
            shift = shift[kept(labels).to(shift.device)]
        view = channel_shape(axis, values[0].dim())
        return [x + shift.to(x).view(view) for x in values]

    def _normalise(
        self, stream: Stream, inputs: Values, layer: Layer, kept: Callable[[Tensor], Tensor] | None
    ) -> Values:
        if kept is None:
            self.known[layer.node] = self.statistics(layer, inputs)
        mean, deviation = self.known[layer.node]
        if kept is not None and layer.carries is not None:
            mean, deviation = (t[kept(layer.carries).to(t.device)] for t in (mean, deviation))
        gain, offset = line(stream.module, layer, mean, deviation)
        view = channel_shape(1, inputs[0].dim())
        return [torch.addcmul(offset.to(x).view(view), x, gain.to(x).view(view)) for x in inputs]


def line(module: fx.GraphModule, norm: Layer, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """The gain and the constant of a BatchNorm that subtracts `mean` and divides by `deviation`: (c,), (c,)."""
    gain, constant = 1 / deviation, torch.zeros_like(mean)
    if "weight" in norm.params:
        gain = gain * at(module, norm.params["weight"]).double()
    if "bias" in norm.params:
        constant = at(module, norm.params["bias"]).double()
    return gain, constant - gain * mean


def moments(values: Sequence[Tensor], axis: int, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean and variance along all axes except `axis`, over all batches and processes: (c,), (c,), float64."""
    if values[0].dim() == 1:  # a vector is one row: without axes to sum over, torch sums over all of them
        values, axis = [x[None] for x in values], 1
    axes = [a for a in range(values[0].dim()) if a != axis]
    view = channel_shape(axis, values[0].dim())
    total = sum(x.numel() // x.size(axis) for x in values)
    count = reduce(torch.tensor(float(total), dtype=torch.float64, device=values[0].device))
    mean = reduce(torch.stack([x.sum(axes, dtype=torch.float64) for x in values]).sum(0)) / count
    apart = [(x - mean.to(x).view(view)).square().sum(axes, dtype=torch.float64) for x in values]
    return mean, reduce(torch.stack(apart).sum(0)) / count


def channel_shape(axis: int, dim: int) -> list[int]:
    """The shape in which a vector broadcasts along one axis of a tensor with `dim` axes: 1 everywhere else."""
    return [-1 if a == axis else 1 for a in range(dim)]


def axis_of_outputs(outputs: Tensor, weight: Tensor) -> int:
    """The axis of the channels: before the spatial axes of a convolution's outputs, the last of a linear layer's."""
    return outputs.dim() - 1 - max(0, weight.dim() - 2)
