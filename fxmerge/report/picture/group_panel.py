"""The data of the page's panel for each group: costs, refit errors, partners, and the similarity of its channels.

Wide groups are sampled and cosines are stored as bytes, to keep the page of a large network small.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge.graph.cost import Cost
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Ints
from fxmerge.ir.provenance import Layer
from fxmerge.options import Options
from fxmerge.plan import GroupPlan, Plan
from fxmerge.planning.statistics import producer_constants, producer_rows, state, statistics
from fxmerge.refit.records import Refitted

LIKENESS = 450_000  # bytes for the heat maps of all groups together
SIDE = 64  # channels in a heat map, at most
PARTNERS = 60  # dropped channels of a group that are drawn with their partner, at most


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What the panels of all groups are computed from.

    costs:     of the original and, after a merge, of the merged model
    refitted:  by layer
    tensors:   the original's parameters and buffers, by name
    side:      channels in a heat map, at most
    """

    captured: Capture
    options: Options
    costs: Sequence[Cost]
    refitted: Mapping[str, Refitted]
    tensors: Mapping[str, Tensor]
    side: int


def group_panels(
    groups: Sequence[Group],
    captured: Capture,
    plan: Plan | None,
    costs: Sequence[Cost],
    refitted: Sequence[Refitted],
) -> list[dict[str, Any]]:
    """The panel of each group, as plain data.

    costs: the cost of the original and, after a merge, of the merged model
    """
    plans = {g.name: g for g in plan.groups} if plan else {}
    source = _Source(
        captured=captured,
        options=plan.options if plan else Options(),
        costs=costs,
        refitted={r.name: r for r in refitted},
        tensors=state(captured.module),
        side=min(SIDE, max(8, int((2 * LIKENESS / max(len(groups), 1)) ** 0.5))),
    )
    return [_panel(g, plans.get(g.name), source) for g in groups]


def _panel(group: Group, plan: GroupPlan | None, source: _Source) -> dict[str, Any]:
    layers = [m.layer for m in (*group.producers, *group.per_channel_params, *group.consumers)]
    unique = {layer.node: layer for layer in layers}
    names = dict.fromkeys(layer.module for layer in unique.values())
    costs = [c.of(unique) for c in source.costs]
    return {
        "parameters": [p for p, _ in costs],
        "flops": [f for _, f in costs],
        "producers": _names(m.layer for m in group.producers),
        "per_channel_params": _names(m.layer for m in group.per_channel_params),
        "consumers": _names(m.layer for m in group.consumers),
        "mixers": list(group.mixers),
        "ties": list(group.ties),
        "scaleBlocks": list(group.scale_blocks),
        "refit": [vars(source.refitted[name]) for name in names if name in source.refitted],
        "similarity": round(plan.similarity, 4) if plan else 1.0,
        "estimate": round(_estimate(plan), 4) if plan else 0.0,
        "dropped": plan.channels - len(plan.kept) if plan else 0,
        "components": plan is not None and plan.components is not None,
        "unpartnered": sum(p.into < 0 for p in plan.partners) if plan else 0,
        "partners": _partners(plan) if plan else [],
        "likeness": _likeness(group, plan, source),
    }


def _estimate(plan: GroupPlan) -> float:
    """The share of the channels' rows that no kept channel carries: 1 - cosine^2 of a dropped channel, 0 of a kept one.

    By it, groups are compared where refit measured nothing.
    """
    if plan.components is not None:
        return 1 - plan.components
    return sum(1 - p.cosine**2 for p in plan.partners) / plan.channels


def _names(layers: Iterable[Layer]) -> list[str]:
    return list(dict.fromkeys(layer.module for layer in layers))


def _partners(plan: GroupPlan) -> list[list[float]]:
    """(dropped channel, kept channel, scale, cosine) of merged channels, sampled evenly by similarity."""
    ordered = sorted((p for p in plan.partners if p.into >= 0), key=lambda p: (-p.cosine, p.channel))
    at = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), PARTNERS)).round().astype(int))
    chosen = sorted((ordered[i] for i in at), key=lambda p: (p.into, p.channel))
    return [[p.channel, p.into, round(p.scale, 3), round(p.cosine, 3)] for p in chosen]


def _likeness(group: Group, plan: GroupPlan | None, source: _Source) -> dict[str, Any]:
    """Cosines of a group's channels (of a sample of them in a wide group), in the order of a clustering.

    channels:  the channels
    kept:      "1" for each kept channel, "0" for each dropped one
    cosines:   the upper triangle without the diagonal, row by row, as base64 of bytes from 0 (-1) to 254 (1)
    """
    n = group.channels
    at = torch.linspace(0, n - 1, min(n, source.side), dtype=torch.float64).round().long()
    cosine = cosines(group, source.captured, source.tensors, source.options, at).numpy()
    order: Ints = np.arange(len(at), dtype=np.int64)
    if len(at) > 2:
        from scipy.cluster.hierarchy import leaves_list, linkage
        from scipy.spatial.distance import squareform

        apart = np.clip(1 - cosine, 0, 2)
        np.fill_diagonal(apart, 0)
        order = leaves_list(linkage(squareform(apart, checks=False), "average", optimal_ordering=True)).astype(np.int64)
    cosine, channels = cosine[np.ix_(order, order)], at.numpy()[order]
    upper = cosine[np.triu_indices(len(at), 1)]
    kept = set(plan.kept) if plan and plan.components is None else set(range(n))
    return {
        "channels": channels.tolist(),
        "kept": "".join("01"[int(c) in kept] for c in channels),
        "cosines": base64.b64encode(((np.clip(upper, -1, 1) + 1) * 127).round().astype(np.uint8)).decode("ascii"),
    }


def cosines(group: Group, captured: Capture, tensors: Mapping[str, Tensor], options: Options, at: Tensor) -> Tensor:
    """(m, m) cosines between the producers' rows of the channels `at` (m,), in the group's common coordinates."""
    if group.partners:
        exact = options.replace(mostsim_scale="exact")  # the published formulas compare rows before their BatchNorm
        inner = statistics(group, captured, tensors, exact, sample=at).evidence.inner
        assert isinstance(inner, Tensor)
    else:
        inner = torch.zeros(len(at), len(at), dtype=torch.float64)
        for producer in group.producers:
            rows = producer_rows(producer, tensors[producer.layer.params["weight"]], group.channels)[at].double()
            rows = torch.cat([rows, producer_constants(producer, tensors, group.channels)[at].to(rows)], 1)
            inner += (rows @ rows.T).cpu()
    norm = inner.diagonal().clamp(min=0).sqrt()
    return inner.cpu() / torch.outer(norm, norm).clamp(min=1e-300).cpu()
