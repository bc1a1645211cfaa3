"""The slopes of a model's outputs at the outputs of its layers, for random signs of the outputs (Hutchinson, 1990)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.batches import batch_size
from fxmerge.calibration.epilogue import pair
from fxmerge.calibration.paired_run import PairedRun, Settings
from fxmerge.calibration.sample_run import SampleRun
from fxmerge.graph.outputs import returned
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance

Place = tuple[str, int]  # a node, and the number of one of the tensors that it returns: a recurrent layer has several


class Slopes:
    """One run of the original on these batches, with gradients enabled, from which slopes are drawn.

    run:     with all values of the run's nodes that are still read
    outputs: by layer, those of each batch
    """

    def __init__(
        self,
        captured: Capture,
        facts: Provenance,
        layers: Collection[str],
        batches: Sequence[Sequence[Any]],
        settings: Settings,
    ) -> None:
        """layers: nodes. Raises RuntimeError where an op fails."""
        self.run = PairedRun(pair(captured.module, facts), [_with_gradients(batch) for batch in batches], settings)
        self.outputs: dict[Place, list[Tensor]] = {}
        self._last: Sequence[Any] = []
        for visit in self.run:
            self._last = visit.outputs
            if visit.node.name not in layers:
                continue
            several = zip(*map(returned, visit.outputs), strict=True)
            self.outputs |= {(visit.node.name, at): list(values) for at, values in enumerate(several)}
            if all(isinstance(value, Tensor) for value in visit.outputs):  # for ops that write in place
                self.run.original.values[visit.node.name] = [value.clone() for value in visit.outputs]

    def draw(self, generator: torch.Generator, again: bool) -> dict[Place, list[Tensor | None]]:
        """The slopes of v . z at each layer's outputs; None where z, the model's outputs, does not depend on them.

        v: random signs; each tensor of z is in units of its own standard deviation. again: whether to draw once more.
        Raises RuntimeError where an op has no gradient.
        """
        ends = [t for out in zip(*map(returned, self._last), strict=True) for t in self.run.unpadded("output", out)]
        total = torch.stack([_drawn(t, generator) for t in ends]).sum()
        tensors = [t for values in self.outputs.values() for t in values]
        found = iter(torch.autograd.grad(total, tensors, retain_graph=again, allow_unused=True))
        return {place: [next(found) for _ in values] for place, values in self.outputs.items()}


def affordable(captured: Capture, elements: int) -> int:
    """The number of samples whose activations have so many elements together; 0 if one sample has more."""
    each = sum(torch.Size(s).numel() for s in captured.shapes.values()) // max(batch_size(captured), 1)
    return elements // max(each, 1)


def on_one_process(settings: Settings) -> Settings:
    """The same settings, with sums over this process alone."""
    return replace(settings, reduce=lambda value: value)


def _with_gradients(batch: Sequence[Any]) -> Sequence[Any]:
    """The batch, with a gradient required for its floating-point inputs and so for all that depends on these."""
    if isinstance(batch, SampleRun):
        return batch.with_gradients()
    return [_leaf(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in batch]


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _drawn(output: Tensor, generator: torch.Generator) -> Tensor:
    """v . z for random signs v, with z in units of its own standard deviation."""
    output = torch.view_as_real(output) if output.is_complex() else output
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * signs).sum() / output.detach().std().clamp(min=1e-30) if output.numel() > 1 else output.sum()
