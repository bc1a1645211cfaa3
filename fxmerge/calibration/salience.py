"""Salience: how much the model's outputs depend on each output position of a layer.

Let y_n (o,) be the outputs of a layer at a position n of a sample, and z the model's outputs. The salience is

    s_n = |d(v . z) / dy_n|^2          v: random signs, one for each output

The features by which a detector knows rare objects vary little over all positions, of which nearly all are background;
they would be the first to leave. Therefore the survey draws half of its rows in proportion to s_n (`patches.sample`).
It takes one forward and one backward pass, and is left out where it brings nothing: for tokens, and for models with one
output for a whole sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.held_out import of_samples, samples
from fxmerge.calibration.paired_run import Settings, axis_of_outputs
from fxmerge.calibration.slopes import Slopes, affordable, on_one_process
from fxmerge.calibration.trial_runs import takes_any_batch
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.weights.by_path import at

_CONVOLUTIONS = ("conv", "depthwise", "conv_transpose")
ELEMENTS = 2**27  # of the activations of the samples that are run at a time, at most


def salience(
    captured: Capture,
    facts: Provenance,
    layers: Mapping[str, Layer],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
) -> dict[str, list[Tensor]]:
    """Layer -> (positions,) for each batch, up to a common factor, in the order of `patches.positions`.

    Of convolutions in models whose outputs have positions, too. Layers without finite slopes are left out; all of them
    where an op has no gradient, where the activations of a sample have more than ELEMENTS, and for a model that is
    divided among processes.

    layers: by node; those that are no convolutions are left out
    """
    layers = {name: layer for name, layer in layers.items() if layer.op in _CONVOLUTIONS}
    dense = captured.recorded is not None or any(output.dim() > 2 for output in captured.outputs)
    if captured.sharding is not None or not layers or not dense:
        return {}
    generator, fit = torch.Generator().manual_seed(settings.seed), affordable(captured, ELEMENTS)
    able = all(samples(batch) <= fit for batch in batches) or (fit > 0 and takes_any_batch(captured))
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    try:
        with evaluating(captured.module), torch.enable_grad():
            for batch in batches if able else ():
                count = samples(batch)
                parts = [of_samples(batch, slice(first, first + fit)) for first in range(0, count, fit)]
                slopes = [_of(captured, facts, layers, part, settings, generator) for part in parts]
                for name in layers:
                    found[name] += _joined([own[name] for own in slopes if name in own], count)
    except RuntimeError:  # an op without a gradient
        found = {name: [] for name in layers}
    missing = [not _usable(found[name], len(batches)) for name in layers]
    bad = settings.reduce(torch.tensor(missing, dtype=torch.float64))  # on any process
    return {name: found[name] for name, failures in zip(layers, bad.tolist(), strict=True) if not failures}


def _of(
    captured: Capture, facts: Provenance, layers: Mapping[str, Layer], part: Sequence[Any], settings: Settings,
    generator: torch.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """Layer -> the salience of one part's output positions, in the shape of the outputs without their channels."""
    slopes, found = Slopes(captured, facts, layers, [part], on_one_process(settings)), {}
    for (name, _), (slope,) in slopes.draw(generator, again=False).items():
        if slope is not None and not slope.is_complex():
            axis = axis_of_outputs(slope, at(captured.module, layers[name].params["weight"]))
            found[name] = slope.float().square().sum(axis)
    return found


def _joined(parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """[(positions,) of the parts of one batch of `count` samples]; [] where these are not along the first axis."""
    if len(parts) == 1:
        return [parts[0].flatten()]
    along = bool(parts) and all(part.dim() for part in parts) and sum(part.size(0) for part in parts) == count
    return [torch.cat([part.flatten() for part in parts])] if along else []


def _usable(found: Sequence[Tensor], batches: int) -> bool:
    return len(found) == batches and all(bool(values.isfinite().all()) for values in found)
