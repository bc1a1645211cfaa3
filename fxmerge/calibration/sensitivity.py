"""Sensitivity: how much the model's outputs change with an error in the outputs of one layer.

Let y be the outputs of a layer, with variance var_c in channel c, and add noise with a share s of that variance. Then
the outputs z of the model change by

    E |dz|^2 = s sum_c var_c sum_positions E_v (d(v . z) / dy_c)^2          v: random signs, one for each output

to first order (Hutchinson's estimate). It takes one forward pass and DRAWS backward passes on some of refit's batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.paired_run import Settings, axis_of_outputs, moments
from fxmerge.calibration.slopes import Slopes, affordable, on_one_process
from fxmerge.calibration.trial_runs import first_samples
from fxmerge.graph.eval_mode import evaluating
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
    some = first_samples(captured, batches, max(1, min(SAMPLES, affordable(captured, ELEMENTS))))
    alone = on_one_process(settings)
    stage("sensitivity")
    generator = torch.Generator().manual_seed(settings.seed)
    found: dict[str, Tensor] = {}
    try:
        with evaluating(captured.module), torch.enable_grad():
            slopes = Slopes(captured, facts, layers, some, alone)
            for draw in range(DRAWS):
                drawn = slopes.draw(generator, draw + 1 < DRAWS)
                for (node, number), values in slopes.outputs.items():
                    axis = axis_of_outputs(values[0], at(captured.module, layers[node].params["weight"]))
                    axes = [a for a in range(values[0].dim()) if a != axis]
                    rows = slopes.run.unpadded(node, [v.detach() for v in values])
                    variance = moments(rows, axis - values[0].dim() + rows[0].dim(), alone.reduce)[1]
                    found.setdefault(node, variance.new_zeros(()))
                    for slope in drawn[node, number]:
                        if slope is not None:
                            squares = slope.double().square()
                            found[node] = found[node] + (squares.sum(axes) if axes else squares) @ variance
    except RuntimeError:  # an op without a gradient
        return {}
    sums = settings.reduce(torch.stack([*found.values()])) if found else torch.zeros(0)
    sums = sums.clamp(min=LEAST * float(sums.max())) if len(sums) else sums
    return dict(zip(found, sums.tolist(), strict=True)) if bool(torch.isfinite(sums).all()) and sums.any() else {}
