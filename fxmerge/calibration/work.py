"""How the work of a run over refit's data is spread over the layers, to tell how much of it is left."""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor, fx

from fxmerge.ir.provenance import Provenance
from fxmerge.weights.by_path import at


def shares_of_work(facts: Provenance, module: fx.GraphModule) -> dict[str, float]:
    """By layer: the share of the work that is done when the run reaches it.

    The work of a layer is that of its products: for each output position with p weights for an output and o outputs,
    p o for the outputs themselves, p p and p o for the sums that it is solved by.
    """
    work = {node.name: 0.0 for node in module.graph.nodes}
    for layer in facts.layers:
        labels = facts.labels.get(layer.node)
        if isinstance(labels, Tensor) and layer.writes is not None and "weight" in layer.params:
            weight = at(module, layer.params["weight"])
            patch = weight.numel() / max(len(layer.writes), 1)
            work[layer.node] += labels.numel() * patch * (2 + patch * layer.groups / max(len(layer.writes), 1))
    total = sum(work.values()) or 1.0
    return {name: done / total for name, done in zip(work, accumulate(work.values(), initial=0.0), strict=False)}
