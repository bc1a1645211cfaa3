"""Curves: what it would cost each group to keep fewer channels, as a function of how many.

What is lost is a share of the variance of what the group's consumers put out, summed over consumers. Where layers are
re-solved later, it is what they could not repair (`elimination.curve`, on the readings of refit's batches); without
batches the channels are taken for Gaussian ones with the moments that weights and BatchNorms give them. Where nothing
is re-solved, channels go by the norm of their rows, and each costs what its nearest partner does not carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxmerge.calibration.epilogue import epilogue_of
from fxmerge.calibration.paired_run import line
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group
from fxmerge.ir.provenance import Layer, Provenance, batch_norms
from fxmerge.methods.allocation import Floats
from fxmerge.methods.elimination import curve
from fxmerge.methods.evidence import Reading
from fxmerge.options import Options
from fxmerge.planning.statistics import Statistics, candidates, moments, statistics
from fxmerge.weights.layout import columns

# Errors of groups are weighed by this power of their consumers' sensitivity. 0 would take a share of any variance for
# equally bad, 1 would be right were nothing repaired downstream: later layers make good much of what reaches them.
POWER = 0.5


@torch.no_grad()
def curves(
    captured: Capture,
    facts: Provenance,
    groups: Sequence[Group],
    rungs: Mapping[str, Floats],
    surveyed: Mapping[str, tuple[Reading, ...]],
    tensors: Mapping[str, Tensor],
    options: Options,
    repaired: bool,
    sensitive: Mapping[str, float],
) -> dict[str, Floats]:
    """{group: the error at each of its rungs, (R,)}, ascending.

    rungs: {group: channels kept in each cell, (R, cells)}; surveyed: what is known of consumers from batches;
    repaired: will layers be re-solved? sensitive: how much the model's outputs move with a layer's (`sensitivity`)
    """
    norms = batch_norms(facts)
    repaired = repaired or options.decomposition == "lstsq"
    found = {}
    for group in groups:
        kept = rungs[group.name]
        total = np.zeros(len(kept))
        if len(kept) > 1:
            readings = surveyed.get(group.name) or _expected(captured, group, tensors, norms, options, repaired)
            ranked = None if repaired else _ranked(group, readings, tensors, options)
            for cell in range(kept.shape[1]):
                inside = (group.cells == cell).nonzero().flatten()
                least = int(kept[:, cell].min())
                own = curve(readings, inside, least).numpy() if ranked is None else ranked(inside)
                total += own[kept[:, cell].astype(np.int64)]
        seen = [sensitive.get(m.layer.node, 0.0) for m in group.consumers or group.producers]
        found[group.name] = np.maximum.accumulate(total) * (sum(seen) ** POWER if sensitive else 1.0)
    return found


def _expected(
    captured: Capture, group: Group, tensors: Mapping[str, Tensor], norms: dict[str, Layer], options: Options,
    centred: bool,
) -> tuple[Reading, ...]:  # fmt: skip
    """A group's consumers as they would see Gaussian channels; where none is a layer, the channels themselves."""
    found = statistics(group, captured, tensors, options)
    readings = []
    nodes = {node.name: node for node in captured.module.graph.nodes}
    for number, consumer in enumerate(group.consumers):
        mean, covariance = moments(found, number, options.seed)
        covariance = covariance if centred else covariance + torch.outer(mean, mean)
        weight = columns(tensors[consumer.layer.params["weight"]], consumer.layer).double()
        read = weight[consumer.where]  # (m, copies, out/groups * kernel)
        norm = epilogue_of(captured.module, nodes[consumer.layer.node], norms, set()).norm
        if norm is not None and "running_var" in norm.params and consumer.layer.groups == 1:
            variance = tensors[norm.params["running_var"]].double()
            gain = line(captured.module, norm, variance, (variance + norm.eps).sqrt())[0]
            read = (read.view(*read.shape[:2], len(gain), -1) * gain[:, None]).flatten(2)
        own = covariance[consumer.channels][:, consumer.channels]
        place = torch.arange(len(consumer.channels))
        read = read.flatten(1).T.contiguous()
        readings.append(Reading(own, read, consumer.channels, place[:, None]))
    return tuple(readings) or (_seen_whole(found),)


def _seen_whole(found: Statistics) -> Reading:
    assert found.covariance is not None  # it was asked for
    n = len(found.covariance)
    identity = torch.eye(n, dtype=torch.float64)
    return Reading(found.covariance, identity, torch.arange(n), torch.arange(n)[:, None])


def _ranked(
    group: Group, readings: Sequence[Reading], tensors: Mapping[str, Tensor], options: Options
) -> Callable[[Tensor], Floats]:
    """The curve of some channels where nothing is re-solved: they go by norm, and a partner carries what it can.

    Of channel i is lost |w_i|^2 min_j (M_ii - M_ij^2 / M_jj), j among those that stay, M second moments about 0.
    """
    norm = candidates(group, tensors, options.seed).norms
    loss = torch.zeros(group.channels, group.channels, dtype=torch.float64)
    for reading in readings:
        moments, energy = reading.gram, reading.weight.square().sum(0)
        lost = moments.diagonal()[:, None].expand_as(moments)
        if options.decomposition != "prune" and group.partners:
            lost = lost - moments.clamp(min=0).square() / moments.diagonal().clamp(min=1e-300)[None, :]
        whole = ((reading.weight @ moments) * reading.weight).sum().clamp(min=1e-300)
        at = reading.channels
        loss[at[:, None], at[None, :]] += energy[:, None] * lost / whole

    def ranked(inside: Tensor) -> Floats:
        order = inside[norm[inside].argsort(descending=True, stable=True)]
        best = loss[order[:, None], order[None, :]].cummin(1).values  # (n, n) of the first j + 1
        total = best.tril(-1).sum(0)  # those behind the first j + 1 go
        found: Floats = torch.cat([total.new_tensor([torch.inf]), total]).numpy()
        return found

    return ranked
