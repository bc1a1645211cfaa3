"""Variants of the example that are moved so that the model's outputs are diverse.

However a few samples are cropped and coloured, deep layers see little besides what these samples show. A few steps of
Adam on the variants themselves raise one output channel of each, drawn at random:

    loss = - mean over the positions of log softmax(SHARP z / deviation of z)_c,    the softmax over the channels

Such an activation maximisation leaves natural images in the end (Yin et al., "Dreaming to distill", CVPR 2020, section
3.1). It ends here when the variants have hardly changed to the eye. No weight is changed. An example of as many samples
as there are channels may show all of them: its variants stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from fxmerge.calibration.batches import Batches, batch_size
from fxmerge.calibration.epilogue import pair
from fxmerge.calibration.input_moves import affordable, extent, movable, step
from fxmerge.calibration.paired_run import PairedRun, Settings
from fxmerge.graph.distributed import rank_and_size
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance

STEPS = 8  # of Adam, at most
RATE, BETAS = 0.03, (0.5, 0.9)  # RATE: in deviations of the inputs
SHARP = 3.0  # the deviation of the outputs before the softmax
BUDGET = 4e12  # FLOPs of all steps together, at most; variants stay as they are if this allows fewer than LEAST
LEAST = 3


def diversified(captured: Capture, facts: Provenance, batches: Batches, settings: Settings) -> Batches:
    """The batches with their floating-point inputs moved.

    They are returned unchanged if no output has more channels than the example has samples, if LEAST steps exceed
    BUDGET, or if an op has no gradient.
    """
    shown, places = batch_size(captured), movable(captured)
    axes = {name: axis for name, (axis, channels) in output_channels(captured, facts).items() if channels > shown}
    if not batches or not places or not axes:
        return batches
    steps = affordable(captured, batches, places[0], steps=STEPS, least=LEAST, budget=BUDGET)
    if not steps:
        return batches
    raising = _Raising(captured, facts, replace(settings, held=False), axes, places, steps)
    rank, size = rank_and_size()
    generators = (Generator().manual_seed(settings.seed + n * size + rank) for n in range(len(batches)))
    try:
        with evaluating(captured.module), torch.enable_grad():
            return [raising.moved(batch, drawn) for batch, drawn in zip(batches, generators, strict=True)]
    except RuntimeError:  # an op without a gradient
        return batches


def output_channels(captured: Capture, facts: Provenance) -> dict[str, tuple[int, int]]:
    """The axis of the channels of each output that has several, and their number, by node."""
    found = {}
    (output,) = (node for node in captured.module.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        labels = facts.labels.get(node.name)
        for axis in range(1, 0 if labels is None else labels.dim()):
            if labels is not None and bool((labels != labels.select(axis, 0).unsqueeze(axis)).any()):
                found[node.name] = axis, labels.size(axis)
                break
    return found


@dataclass(frozen=True)
class _Raising:
    captured: Capture
    facts: Provenance
    settings: Settings
    axes: Mapping[str, int]  # of the channels, by output
    places: Sequence[int]  # of the inputs that move
    steps: int

    def moved(self, batch: Sequence[Any], generator: Generator) -> list[Any]:
        """A batch after all steps."""
        scale = {place: batch[place].std(correction=0) for place in self.places}
        ranges = extent(batch, self.places)
        moves = {place: torch.zeros_like(batch[place], requires_grad=True) for place in self.places}
        aims: dict[str, tuple[Tensor, Tensor]] = {}

        def values() -> list[Any]:
            there = {at: (batch[at] + scale[at] * move).clamp(*ranges[at]) for at, move in moves.items()}
            return [there.get(place, value) for place, value in enumerate(batch)]

        adam = torch.optim.Adam(list(moves.values()), lr=RATE, betas=BETAS)
        for _ in range(self.steps):
            step(adam, self._loss(values(), aims, generator), list(moves.values()))
        with torch.no_grad():
            return values()

    def _loss(self, values: list[Any], aims: dict[str, tuple[Tensor, Tensor]], generator: Generator) -> Tensor:
        """aims: by output, the channel that each sample raises and the outputs' factor; filled at the first step."""
        losses = []
        for visit in PairedRun(pair(self.captured.module, self.facts), [values], self.settings):
            name = visit.node.name
            if name not in self.axes:
                continue
            y = visit.outputs[0].movedim(self.axes[name], 1)
            y = y.reshape(len(y), y.size(1), -1)
            if name not in aims:
                channels = torch.randint(y.size(1), (len(y), 1, 1), generator=generator)
                aims[name] = channels.to(y.device), SHARP / y.detach().std().clamp(min=1e-30)
            channels, factor = aims[name]
            losses.append(-(factor * y).log_softmax(1).gather(1, channels.expand(-1, 1, y.size(2))).mean())
        return torch.stack(losses).sum()
