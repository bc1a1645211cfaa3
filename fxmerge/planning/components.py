"""The principal components of a group whose paths are linear (`analysis/linear_paths.py`), by what its consumers read.

The moments are those of refit's data where there are data. Estimated from few rows, they are blended with the moments
by weights: white inputs of the producers. The latter know from which directions the rows can come at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Decomposition, Group, Merge
from fxmerge.methods.by_moments import cellwise_least_squares
from fxmerge.methods.components import NULL, RIDGE, Components, blended, components
from fxmerge.methods.evidence import Reading
from fxmerge.methods.generalisation import shrinkage
from fxmerge.options import Options
from fxmerge.planning.channel_ops import bias_of
from fxmerge.planning.decompose import mixture, served
from fxmerge.planning.sources import covariance_of
from fxmerge.planning.statistics import moments_seen, statistics
from fxmerge.weights.layout import columns, out_first

WIDEST = 2048  # channels of a cell; the eigenvectors of more take long


@dataclass(frozen=True)
class Read:
    """How one consumer reads a group, copy by copy.

    mean, covariance: (copies, n), (copies, n, n) of the channels
    mass:             (copies, n, n) W'W as a share of the variance of the consumer's outputs
    constants:        whether it can take a constant
    """

    mean: Tensor
    covariance: Tensor
    mass: Tensor
    constants: bool


def able(group: Group, options: Options) -> bool:
    """Do the options admit components for a group, and do its paths?

    `auto` considers them only where it may choose the channels, too.
    """
    asked = options.decomposition == "pca" or (options.decomposition == "auto" and options.selection == "repair")
    return asked and not group.nonlinear and int(torch.bincount(group.cells).max()) <= WIDEST


def components_of(
    group: Group, captured: Capture, tensors: Mapping[str, Tensor], options: Options, readings: Sequence[Reading]
) -> tuple[Components, tuple[Read, ...]]:
    """The components of a group, and how each of its consumers reads it.

    They are those of the mean of the moments at all consumers, as these share one `down`.
    """
    modelled = _modelled(group, captured, tensors, options)
    known = {r.consumer: r for r in readings if r.mean is not None}
    if len(known) == len(group.consumers):
        rows = min(r.independent for r in known.values())
        reads = [_by_data(group, known[number], modelled) for number in range(len(group.consumers))]
    else:
        rows = float("inf")
        reads = [_by_weights(group, number, tensors, modelled) for number in range(len(group.consumers))]
    strands = torch.tensor([s for own in group.strands.consumers for s in own])
    once = torch.nn.functional.one_hot(strands, group.strands.count).double()  # (copies of all consumers, strands)
    covariance = torch.einsum("cs,cmn->smn", once, torch.cat([read.covariance for read in reads]))
    mass = torch.einsum("cs,cmn->smn", once, torch.cat([read.mass for read in reads]))
    covariance /= once.sum(0).clamp(min=1)[:, None, None]
    return components(covariance, mass, group.cells, rows), tuple(reads)


def _modelled(
    group: Group, captured: Capture, tensors: Mapping[str, Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Mean (strands, n) and covariance (strands, n, n) of the channels by weights alone: for white inputs."""
    if group.strands.count == 1:
        sources = statistics(group, captured, tensors, options).sources
        level = torch.stack([source.share * source.mean for source in sources]).sum(0)
        return level.cpu()[None], covariance_of(sources).cpu()[None]
    layer, where = group.producers[0].layer, group.producers[0].where
    rows = out_first(tensors[layer.params["weight"]], layer).flatten(1).double().cpu()[where]  # (n, strands, x)
    level = bias_of(layer, tensors).cpu()[where].T
    return level, torch.einsum("msx,nsx->smn", rows, rows)


def _by_weights(group: Group, number: int, tensors: Mapping[str, Tensor], modelled: tuple[Tensor, Tensor]) -> Read:
    """About zero, unless there is nothing on the way that could change a constant, as padding does."""
    consumer = group.consumers[number]
    layer, strands = consumer.layer, list(group.strands.consumers[number])
    straight = layer.op != "conv" and not any(member.steps for member in (*group.producers, *group.consumers))
    mean, covariance = (part[strands] for part in modelled)
    # without refit, a bias is added only where it is exact
    constants = straight and layer.takes_constants and ("bias" in layer.params or not bool(mean.any()))
    weight = columns(tensors[layer.params["weight"]], layer).double().cpu()[consumer.where]  # (m, copies, x)
    mass = torch.einsum("mcx,lcx->cml", weight, weight)
    return _read(mean, covariance, mass, consumer.channels, constants)


def _by_data(group: Group, reading: Reading, modelled: tuple[Tensor, Tensor]) -> Read:
    consumer, strands = group.consumers[reading.consumer], group.strands.consumers[reading.consumer]
    places = reading.columns.view(len(reading.channels), len(strands), -1)  # (m, copies, kernel)
    means, covariances, masses = [], [], []
    for copy, strand in enumerate(strands):
        own = replace(reading, columns=places[:, copy])
        mean, covariance = moments_seen(own, group.channels)
        means.append(mean)
        few = shrinkage(covariance, reading.independent)
        covariances.append(blended(covariance, modelled[1][strand], few))
        weight = reading.weight.double()[:, places[:, copy]]  # (o, m, kernel)
        masses.append(torch.einsum("omx,olx->ml", weight, weight))
    constants = consumer.layer.takes_constants
    return _read(torch.stack(means), torch.stack(covariances), torch.stack(masses), reading.channels, constants)


def _read(mean: Tensor, covariance: Tensor, own: Tensor, channels: Tensor, constants: bool) -> Read:
    """own: W'W of the m channels that the consumer reads, (copies, m, m)"""
    mass = torch.zeros_like(covariance)
    mass[:, channels[:, None], channels] = own
    if not constants:
        covariance, mean = covariance + mean[:, :, None] * mean[:, None, :], torch.zeros_like(mean)
    whole = (mass * covariance).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Read(mean, covariance, mass / whole, constants)


def merge_of(group: Group, kept: Tensor, reads: Sequence[Read], rotation: Tensor) -> Merge:
    """What the consumers of a rotated group absorb: for each copy, the regression on the components that are kept."""
    consumers: dict[int, Decomposition] = {}
    for numbers in served(group):
        strands = group.strands.consumers[numbers[0]]
        ups, shifts = [], []
        for copy, strand in enumerate(strands):
            mean, covariance = mixture([(reads[n].mean[copy], reads[n].covariance[copy]) for n in numbers])
            turned = rotation[strand] @ mean, rotation[strand] @ covariance @ rotation[strand].T
            up, shift = cellwise_least_squares(*turned, kept, group.cells, RIDGE)
            power = (covariance.diagonal() + mean.square()).mean()
            solid = reads[numbers[0]].constants and shift.square() > NULL**2 * power  # not for rounding: it adds a bias
            ups.append(up)
            shifts.append(torch.where(torch.as_tensor(solid), shift, 0.0))
        part = Decomposition(torch.stack(ups), torch.stack(shifts, 1))
        consumers |= dict.fromkeys(numbers, part)
    return Merge(group, kept, None, tuple(consumers[number] for number in range(len(group.consumers))))
