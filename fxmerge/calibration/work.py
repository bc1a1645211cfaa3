"""How the work of a run over refit's data is spread over the layers, to tell how much of it is left."""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor, fx

from fxmerge.calibration.paired_run import Settings
from fxmerge.ir.provenance import Provenance
from fxmerge.weights.by_path import at

SOLVES = 3.0  # the work of all factorisations of p x p sums, in units of p^3


def shares_of_work(
    facts: Provenance, module: fx.GraphModule, samples: int, settings: Settings, solves: float = 0.0
) -> dict[str, float]:
    """By layer: the share of the work that is done when the run reaches it.

    The work of a layer that writes channels is that of its products. With r output positions, p weights for an output
    and o outputs, these are r p o for the outputs, and for at most `settings.rows` positions p p and p o for the sums
    that it is solved by; then `solves` p^3 for the solutions.
    """
    work = {node.name: 0.0 for node in module.graph.nodes}
    for layer in facts.layers:
        labels = facts.labels.get(layer.node)
        if isinstance(labels, Tensor) and labels.dim() and layer.writes is not None and "weight" in layer.params:
            out = max(len(layer.writes), 1)
            patch = at(module, layer.params["weight"]).numel() / out
            positions = labels.numel() / max(labels.size(0), 1) / out * samples
            sums = min(positions, settings.rows) * patch * (patch * layer.groups + out)
            work[layer.node] += positions * patch * out + sums + solves * layer.groups * patch**3
    total = sum(work.values()) or 1.0
    return {name: done / total for name, done in zip(work, accumulate(work.values(), initial=0.0), strict=False)}
