"""Silencing by hand: a merged model computes what the original does with its dropped channels silent."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.graph.compare import difference, outputs


def silenced(model: nn.Module, result: fxmerge.Result) -> nn.Module:
    """A copy in which the rows and biases of the dropped channels, and the columns that read them, are zero."""
    dead = copy.deepcopy(model)
    own = {**dict(dead.named_parameters()), **dict(dead.named_buffers())}
    kept = {p.name: set(p.kept) for p in result.plan.groups}
    with torch.no_grad():
        for g in (g for g in result.analysis.grouping.everything if g.name in kept):
            for member in (*g.producers, *g.consumers):
                gone = [i for i, c in enumerate(member.channels.tolist()) if c not in kept[g.name]]
                places, reads = member.where[gone].flatten(), member.role == "read"
                weight = own[member.layer.params["weight"]]
                weight.index_fill_(int(reads != member.layer.transposed), places, 0)
                if not reads and "bias" in member.layer.params:
                    own[member.layer.params["bias"]].index_fill_(0, places, 0)
    return dead


def error_of_silence(model: nn.Module, example: Any, unseen: Any, **options: Any) -> tuple[float, fxmerge.Result]:
    """(how far the merged copy of the silenced model is from it on unseen inputs, the result of the merge)."""
    result = fxmerge.merge(model, example, refit="none", decomposition="prune", **options)
    dead = silenced(model, result)
    merged = fxmerge.apply(result.plan, dead, example).module

    def run(module: nn.Module) -> list[Tensor]:
        return outputs(module, unseen if isinstance(unseen, tuple) else (unseen,), {})

    return difference(run(dead), run(merged)), result
