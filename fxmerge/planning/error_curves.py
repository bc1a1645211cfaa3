"""The error of each group as a function of the number of channels that it keeps.

The error is the lost share of the variance of the consumers' outputs, summed over the group's consumers. If layers are
re-solved later, it is the share that re-solving cannot recover (`elimination.curve`, on the readings of refit's data);
without such data, the channels are taken as Gaussian, with the moments given by the weights and BatchNorms. If layers
are not re-solved, channels are dropped in the order of their rows' norms, and each loses what its most similar kept
channel cannot replace. A group that may keep principal components loses those that are dropped (`Components.curve`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fxmerge.calibration.batches import Batches
from fxmerge.calibration.epilogue import epilogue_of
from fxmerge.calibration.paired_run import Settings, line
from fxmerge.calibration.words import scores_words, word_counts
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group
from fxmerge.ir.provenance import Layer, Provenance, batch_norms
from fxmerge.methods.allocation import Counts, Floats
from fxmerge.methods.elimination import Orders, curve
from fxmerge.methods.evidence import Reading
from fxmerge.options import Options
from fxmerge.planning.alone import NONE, calibrated, losses_alone
from fxmerge.planning.candidates import candidates
from fxmerge.planning.components import able, components_of
from fxmerge.planning.room import Room
from fxmerge.planning.selecting import Selected
from fxmerge.planning.sources import covariance_of
from fxmerge.planning.statistics import Statistics, moments, statistics
from fxmerge.progress import Stage
from fxmerge.weights.layout import columns

# The error of a group is weighted by its consumers' sensitivity to this power. 0 would weight all groups equally. 1
# would be right if later layers did not compensate for errors in their inputs, but re-solving lets them do so.
POWER = 0.5
# The same for what the outputs lose if a group alone narrows, as a multiple of what is typical. Refit brings square
# errors down, and hardly the divergences of a language model, which count as they are.
ALONE = 0.7


def errors(
    room: Room,
    select: Callable[[Counts], Selected],
    batches: Batches,
    settings: Settings,
    *,
    readings: Mapping[str, tuple[Reading, ...]],
    tensors: Mapping[str, Tensor],
    orders: Orders,
    sensitivity: Callable[[], Mapping[str, float]],
    stage: Stage,
) -> dict[str, Floats]:
    """{group: the error at each of its rungs, (R,)} for the groups that may narrow, in one unit.

    Curves are scaled to what the outputs lose if their group alone narrows (see `alone`). Where that cannot be
    measured, they are weighted by the sensitivity of the outputs to their consumers' errors.

    batches: refit's data, if there are any
    """
    free, seen = room.free, bool(batches)
    found = curves(
        room.captured, room.facts, free, room.options, ladders=room.ladders, readings=readings, tensors=tensors,
        refitted=seen, orders=orders,
    )  # fmt: skip
    alone = losses_alone(room, select, batches, settings, readings=readings, tensors=tensors, stage=stage)
    weights = sensitivity() if seen and not alone else {}
    words = word_counts(room.captured.module, room.facts)
    power = 1.0 if any(scores_words(y, words) for y in room.captured.outputs) else ALONE
    return scaled(found, free, ladders=room.ladders, sensitivity=weights, alone=alone, power=power)


@torch.no_grad()
def curves(
    captured: Capture,
    facts: Provenance,
    groups: Sequence[Group],
    options: Options,
    *,
    ladders: Mapping[str, Floats],
    readings: Mapping[str, tuple[Reading, ...]],
    tensors: Mapping[str, Tensor],
    refitted: bool,
    orders: Orders,
) -> dict[str, Floats]:
    """{group: the error at each of its rungs, (R,)}, ascending, as shares of the variances of the consumers' outputs.

    ladders:      {group: channels kept in each cell at each rung, (R, cells)}
    readings:     {group: its consumers' second moments on refit's data}, where there is data
    refitted:     whether layers will be re-solved
    orders:       the orders of elimination that are known
    """
    norms = batch_norms(facts)
    refitted = refitted or options.by_channels.decomposition in ("lstsq", "auto")
    found = {}
    for group in groups:
        kept = ladders[group.name]
        total = np.zeros(len(kept))
        if len(kept) > 1:
            seen = readings.get(group.name) or _expected(captured, group, tensors, norms, options, refitted)
            known = orders if group.name in readings else None  # else these readings are made for this curve alone
            ranked = None if refitted else _ranked(captured, group, seen, tensors, options)
            turned = None
            if able(group, options):
                turned = components_of(group, captured, tensors, options, readings.get(group.name, ()))[0]
            for cell in range(kept.shape[1]):
                inside = (group.cells == cell).nonzero().flatten()
                least = int(kept[:, cell].min())
                seeing = [r for r in seen if bool(torch.isin(r.channels, inside).any())] or seen
                if turned is None or options.decomposition != "pca":
                    own = curve(seeing, inside, least, known).numpy() if ranked is None else ranked(inside)
                if turned is not None:
                    by_components = turned.curve(cell).numpy()
                    own = by_components if options.decomposition == "pca" else np.minimum(own, by_components)
                total += own[kept[:, cell].astype(np.int64)]
        found[group.name] = np.maximum.accumulate(total)
    return found


def scaled(
    errors: Mapping[str, Floats],
    groups: Sequence[Group],
    *,
    ladders: Mapping[str, Floats],
    sensitivity: Mapping[str, float],
    alone: Mapping[str, tuple[int, float]],
    power: float,
) -> dict[str, Floats]:
    """The errors of groups, (R,) each, as shares of the variance of the model's outputs, or in proportion to them.

    sensitivity:  {layer: how much the model's outputs change with an error in its outputs}
    alone:        {group: a rung, and what the outputs lose if the group alone narrows to it}: curves are scaled to it,
                  by factors f that are drawn towards the median m of all, m (f / m)^power
    """
    found = {}
    for group in groups:
        weights = [sensitivity.get(m.layer.node, 0.0) for m in group.consumers or group.producers]
        found[group.name] = errors[group.name] * (sum(weights) ** POWER if sensitivity else 1.0)
    pairs = {name: (loss, found[name][rung]) for name, (rung, loss) in alone.items()}
    factors = {name: loss / own for name, (loss, own) in pairs.items() if loss > NONE and own > NONE}
    typical = float(np.median([*factors.values()])) if factors else 1.0

    def own_scale(name: str, own: Floats) -> Floats:
        if name not in alone:
            return own * typical
        rung, loss = alone[name]
        drawn = own[rung] * typical * (factors[name] / typical) ** power if name in factors else loss
        return calibrated(own, ladders[name], rung, drawn, typical)

    return {name: own_scale(name, own) for name, own in found.items()}


def _expected(
    captured: Capture, group: Group, tensors: Mapping[str, Tensor], norms: dict[str, Layer], options: Options,
    centred: bool,
) -> tuple[Reading, ...]:  # fmt: skip
    """The readings of a group's consumers for Gaussian channels; of the channels themselves if no consumer is a layer.

    centred: whether second moments are about the mean, as where layers are re-solved with a bias, or about 0
    """
    found = statistics(group, captured, tensors, options)
    readings = []
    nodes = {node.name: node for node in captured.module.graph.nodes}
    for number, consumer in enumerate(group.consumers):
        mean, covariance = moments(found, number, options.seed)
        covariance = covariance if centred else covariance + torch.outer(mean, mean)
        weight = columns(tensors[consumer.layer.params["weight"]], consumer.layer).double()
        read = weight[consumer.where]  # (m, copies, out/groups * kernel)
        norm = epilogue_of(captured.module, nodes[consumer.layer.node], norms, set()).norm
        single = consumer.layer.groups == 1 and not consumer.layer.is_stacked
        if norm is not None and norm.has_running_statistics and single:
            variance = tensors[norm.params["running_var"]].double()
            gain = line(captured.module, norm, variance, (variance + norm.eps).sqrt())[0]
            read = (read.view(*read.shape[:2], len(gain), -1) * gain[:, None]).flatten(2)
        own = covariance[consumer.channels][:, consumer.channels]
        place = torch.arange(len(consumer.channels))
        read = read.flatten(1).T.contiguous()
        readings.append(Reading(own, read, consumer.channels, place[:, None]))
    return tuple(readings) or (_seen_whole(found),)


def _seen_whole(found: Statistics) -> Reading:
    assert found.sources  # `statistics` was called without `kept`
    covariance = covariance_of(found.sources)
    n = len(covariance)
    identity = torch.eye(n, dtype=torch.float64)
    return Reading(covariance, identity, torch.arange(n), torch.arange(n)[:, None])


def _ranked(
    captured: Capture, group: Group, readings: Sequence[Reading], tensors: Mapping[str, Tensor], options: Options
) -> Callable[[Tensor], Floats]:
    """The error curve of a cell's channels where layers are not re-solved.

    Channels are dropped in the order of their norms. A dropped channel i loses |w_i|^2 min_j (M_ii - M_ij^2 / M_jj),
    with j among the kept channels and M the second moments about 0.
    """
    norm = candidates(group, captured, tensors, options.seed).norms
    loss = torch.zeros(group.channels, group.channels, dtype=torch.float64)
    for reading in readings:
        moments, weight = reading.gram.double(), reading.weight.double()
        energy = weight.square().sum(0)
        lost = moments.diagonal()[:, None].expand_as(moments)
        if options.decomposition != "prune" and group.partners:
            lost = lost - moments.clamp(min=0).square() / moments.diagonal().clamp(min=1e-300)[None, :]
        whole = ((weight @ moments) * weight).sum().clamp(min=1e-300)
        at = reading.channels
        loss[at[:, None], at[None, :]] += energy[:, None] * lost / whole

    def ranked(inside: Tensor) -> Floats:
        order = inside[norm[inside].argsort(descending=True, stable=True)]
        best = loss[order[:, None], order[None, :]].cummin(1).values  # (n, n) best partner among the first j + 1
        total = best.tril(-1).sum(0)  # all but the first j + 1 are dropped
        found: Floats = torch.cat([total.new_tensor([torch.inf]), total]).numpy()
        return found

    return ranked
