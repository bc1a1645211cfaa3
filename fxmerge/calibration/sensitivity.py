"""Sensitivity: how much the model's outputs change with an error in the outputs of one layer.

Let y be the outputs of a layer, with variance var_c in channel c, and add noise with a share s of that variance. Then
the outputs z of the model change by

    E |dz|^2 = s sum_c var_c sum_positions E_v (d(v . z) / dy_c)^2          v: random signs, one for each output

to first order (Hutchinson's estimate). It takes one forward pass and DRAWS backward passes on some of refit's batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.batches import batch_size
from fxmerge.calibration.epilogue import pair
from fxmerge.calibration.paired_run import PairedRun, Settings, axis_of_outputs, moments
from fxmerge.calibration.sample_run import SampleRun
from fxmerge.calibration.trial_runs import first_samples
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.outputs import returned
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group
from fxmerge.ir.provenance import Provenance
from fxmerge.progress import Stage, silent
from fxmerge.weights.by_path import at

DRAWS = 2
SAMPLES, ELEMENTS = 128, 2**28  # samples, and elements of all their activations together, at most; at least one batch
LEAST = 1e-6  # the smallest sensitivity, as a share of the largest


def sensitivity(
    captured: Capture,
    facts: Provenance,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
    stage: Stage = silent,
) -> dict[str, float]:
    """Layer -> sensitivity, up to a common factor, of the groups' consumers; of the producers of groups without any.

    Empty where an op has no gradient, or where nothing finite and positive is found.
    """
    members = [m for g in groups for m in (g.consumers or g.producers)]
    layers = {m.layer.node: m.layer for m in members if "weight" in m.layer.params}
    some = _some(captured, batches)
    alone = replace(settings, reduce=lambda value: value)
    stage("sensitivity")
    generator = torch.Generator().manual_seed(settings.seed)
    found: dict[str, Tensor] = {}
    try:
        with evaluating(captured.module), torch.enable_grad():
            outputs: dict[tuple[str, int], list[Tensor]] = {}  # a recurrent layer returns several tensors
            last: Sequence[Any] = []
            run = PairedRun(pair(captured.module, facts), some, alone)
            for visit in run:
                if visit.node.name in layers:
                    several = zip(*map(returned, visit.outputs), strict=True)
                    outputs |= {(visit.node.name, at): list(values) for at, values in enumerate(several)}
                last = visit.outputs
            tensors = [t for values in outputs.values() for t in values]
            for draw in range(DRAWS):
                ends = [t for out in zip(*map(returned, last), strict=True) for t in run.unpadded("output", out)]
                total = torch.stack([_drawn(t, generator) for t in ends]).sum()
                slopes = iter(torch.autograd.grad(total, tensors, retain_graph=draw + 1 < DRAWS, allow_unused=True))
                for (node, _), values in outputs.items():
                    layer = layers[node]
                    axis = axis_of_outputs(values[0], at(captured.module, layer.params["weight"]))
                    axes = [a for a in range(values[0].dim()) if a != axis]
                    rows = run.unpadded(node, [v.detach() for v in values])
                    variance = moments(rows, axis - values[0].dim() + rows[0].dim(), alone.reduce)[1]
                    found.setdefault(node, variance.new_zeros(()))
                    for slope in [next(slopes) for _ in values]:
                        if slope is not None:
                            squares = slope.double().square()
                            found[node] = found[node] + (squares.sum(axes) if axes else squares) @ variance
    except RuntimeError:  # an op without a gradient
        return {}
    sums = settings.reduce(torch.stack([*found.values()])) if found else torch.zeros(0)
    sums = sums.clamp(min=LEAST * float(sums.max())) if len(sums) else sums
    return dict(zip(found, sums.tolist(), strict=True)) if bool(torch.isfinite(sums).all()) and sums.any() else {}


def _some(captured: Capture, batches: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """A few samples, with a gradient required for their floating-point inputs and so for all that depends on these."""
    size = batch_size(captured)
    each = sum(torch.Size(s).numel() for s in captured.shapes.values()) // max(size, 1)
    wanted = max(1, min(SAMPLES, ELEMENTS // max(each, 1)))
    return [
        cut.with_gradients()
        if isinstance(cut, SampleRun)
        else [_leaf(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in cut]
        for cut in first_samples(captured, batches, wanted)
    ]


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _drawn(output: Tensor, generator: torch.Generator) -> Tensor:
    """v . z for random signs v, with z in units of its own standard deviation."""
    output = torch.view_as_real(output) if output.is_complex() else output
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * signs).sum() / output.detach().std().clamp(min=1e-30) if output.numel() > 1 else output.sum()
