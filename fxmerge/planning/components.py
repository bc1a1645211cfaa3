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
from fxmerge.weights.factors import constant_of, gain_of, slot_of
from fxmerge.weights.layout import columns, out_first

WIDEST = 2048  # channels of a cell; the eigenvectors of more take long


@dataclass(frozen=True)
class Read:
    """How one consumer reads a group, copy by copy.

    It reads gain * x, with the gain of the factors that move into it.

    mean, covariance: (copies, n), (copies, n, n) of x: the channels, or what a norm makes of them before its gain
    mass:             (copies, n, n) W'W as a share of the variance of the consumer's outputs, with the gains in W
    constants:        whether it can take a constant
    gain:             (n,)
    offset:           (n,) what the norm's bias is in x, where it reaches the consumer as it is; else 0
    normed:           does a norm make x of the channels?
    centred:          is it a LayerNorm?
    """

    mean: Tensor
    covariance: Tensor
    mass: Tensor
    constants: bool
    gain: Tensor
    offset: Tensor
    normed: bool = False
    centred: bool = False

    @property
    def inverse(self) -> Tensor:
        """1 / gain, and 0 where a channel is not read, (n,)."""
        return torch.where(self.gain == 0, 0.0, 1 / self.gain)


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
        reads = [_by_data(group, known[number], tensors, modelled) for number in range(len(group.consumers))]
    else:
        rows = float("inf")
        reads = [_by_weights(group, number, tensors, modelled) for number in range(len(group.consumers))]
    strands = torch.tensor([s for own in group.strands.consumers for s in own])
    once = torch.nn.functional.one_hot(strands, group.strands.count).double()  # (copies of all consumers, strands)
    covariance = torch.einsum("cs,cmn->smn", once, torch.cat([read.covariance for read in reads]))
    mass = torch.einsum("cs,cmn->smn", once, torch.cat([read.mass for read in reads]))
    covariance /= once.sum(0).clamp(min=1)[:, None, None]
    return components(covariance, mass, group.cells, rows, group.factors.centred), tuple(reads)


def _modelled(
    group: Group, captured: Capture, tensors: Mapping[str, Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Mean (strands, n) and covariance (strands, n, n) of the channels by weights alone: for white inputs."""
    if group.strands.count == 1 and not group.factors.producers:
        sources = statistics(group, captured, tensors, options).sources
        level = torch.stack([source.share * source.mean for source in sources]).sum(0)
        return level.cpu()[None], covariance_of(sources).cpu()[None]
    found = []
    for number, producer in enumerate(group.producers if group.strands.count == 1 else group.producers[:1]):
        layer, where = producer.layer, producer.where
        rows = out_first(tensors[layer.params["weight"]], layer).flatten(1).double().cpu()[where]  # (n, strands, x)
        level = bias_of(layer, tensors).cpu()[where].T
        if layer.op == "embedding":
            level, rows = rows.mean(-1).T, rows / rows.size(-1) ** 0.5  # it gives one of its entries at a time
        covariance = torch.einsum("msx,nsx->smn", rows, rows)
        moved = group.factors.producers[number] if group.factors.producers else ()
        gain = gain_of(moved, tensors.__getitem__, group.channels)
        level, covariance = gain * level, gain[:, None] * gain * covariance
        norms = [at for at, part in enumerate(moved) if part.layer.has_running_statistics]
        if norms:  # its outputs have the mean beta, and together the variance gamma^2
            last, later = moved[norms[-1]], gain_of(moved[norms[-1] + 1 :], tensors.__getitem__, group.channels)
            gamma, beta = (slot_of(last, slot, tensors.__getitem__, group.channels) for slot in ("weight", "bias"))
            whole = covariance[0].diagonal().sum().clamp(min=torch.finfo(torch.float64).tiny)
            level, covariance = (later * beta)[None], covariance * ((gamma * later).square().sum() / whole)
        found.append((level, covariance))
    return torch.stack([level for level, _ in found]).sum(0), torch.stack([own for _, own in found]).sum(0)


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
    read = _plain(group, number, tensors)
    if read.normed:
        mean, covariance = _normed(mean, covariance, read.centred)
        constants = "bias" in layer.params and layer.op != "conv" and group.factors.constant[number]
        if constants:  # of the norm's bias only: what the norm makes of the channels' means is not known
            mean, covariance = read.offset.expand_as(mean), covariance + mean[:, :, None] * mean[:, None, :]
    return _read(replace(read, mean=mean, covariance=covariance, constants=constants), mass, consumer.channels)


def _by_data(group: Group, reading: Reading, tensors: Mapping[str, Tensor], modelled: tuple[Tensor, Tensor]) -> Read:
    consumer, strands = group.consumers[reading.consumer], group.strands.consumers[reading.consumer]
    places = reading.columns.view(len(reading.channels), len(strands), -1)  # (m, copies, kernel)
    read = _plain(group, reading.consumer, tensors)
    means, covariances, masses = [], [], []
    for copy, strand in enumerate(strands):
        mean, covariance = moments_seen(replace(reading, columns=places[:, copy]), group.channels)
        means.append(mean * read.inverse)
        covariance = covariance * read.inverse[:, None] * read.inverse
        few = shrinkage(covariance, reading.independent)
        level, expected = modelled[0][strand], modelled[1][strand]
        expected = _normed(level, expected, read.centred)[1] if read.normed else expected
        covariances.append(blended(covariance, expected, few))
        weight = reading.weight.double()[:, places[:, copy]]  # (o, m, kernel)
        masses.append(torch.einsum("omx,olx->ml", weight, weight))
    read = replace(read, mean=torch.stack(means), covariance=torch.stack(covariances))
    return _read(replace(read, constants=consumer.layer.takes_constants), torch.stack(masses), reading.channels)


def _plain(group: Group, number: int, tensors: Mapping[str, Tensor]) -> Read:
    """What factors tell of a consumer, and no moments."""
    n, none = group.channels, torch.zeros(0)
    parts = group.factors.consumers[number] if group.factors.consumers else ()
    normed = bool(group.factors.normed) and group.factors.normed[number]
    gain, constant = (f(parts, tensors.__getitem__, n) for f in (gain_of, constant_of))
    read = Read(none, none, none, False, gain, torch.zeros(n).double(), normed, normed and group.factors.centred)
    reaches = normed and group.factors.constant[number]
    return replace(read, offset=constant * read.inverse) if reaches else read


def _normed(mean: Tensor, covariance: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Moments (..., n), (..., n, n) of channels after a norm: of a mean square of 1, about their mean if `centred`."""
    n = mean.size(-1)
    if centred:
        mean = mean - mean.mean(-1, keepdim=True)
        covariance = covariance - covariance.mean(-1, keepdim=True)
        covariance = covariance - covariance.mean(-2, keepdim=True)
    power = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + mean.square().sum(-1)
    power = power.clamp(min=torch.finfo(power.dtype).tiny) / n
    return mean / power.sqrt()[..., None], covariance / power[..., None, None]


def _read(read: Read, own: Tensor, channels: Tensor) -> Read:
    """own: W'W of the m channels that the consumer reads, (copies, m, m)"""
    mean, covariance = read.mean, read.covariance
    mass = torch.zeros_like(covariance)
    mass[:, channels[:, None], channels] = own
    mass = mass * read.gain[:, None] * read.gain
    if not read.constants:
        covariance, mean = covariance + mean[:, :, None] * mean[:, None, :], torch.zeros_like(mean)
    whole = (mass * covariance).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return replace(read, mean=mean, covariance=covariance, mass=mass / whole)


def merge_of(group: Group, kept: Tensor, reads: Sequence[Read], rotation: Tensor) -> Merge:
    """What the consumers of a rotated group absorb: for each copy, the regression on the components that are kept.

    What a norm makes of fewer channels is larger. Its weight makes up for that, or else that of the consumer does.
    """
    consumers: dict[int, Decomposition] = {}
    shares: dict[str, list[float]] = {}
    for numbers in served(group):
        found = regressed(group, numbers, kept, reads, rotation)
        ups, share = torch.stack([part.up for part in found]), found[0].share
        moved = group.factors.consumers[numbers[0]] if group.factors.consumers else ()
        weights = [part.layer.params["weight"] for part in moved if "weight" in part.layer.params]
        if weights:
            shares.setdefault(weights[0], []).append(share)
        else:
            ups = ups * share
        part = Decomposition(ups, torch.stack([part.shift for part in found], 1))
        consumers |= dict.fromkeys(numbers, part)
    norms = {path: sum(own) / len(own) for path, own in shares.items()}
    return Merge(group, kept, None, tuple(consumers[n] for n in range(len(group.consumers))), norms=norms)


@dataclass(frozen=True)
class Regression:
    """x ~ up @ x_kept + shift in the rotated coordinates: up (n, k), shift (n,).

    share: x_kept as a multiple of what the norm makes of the kept channels alone
    """

    up: Tensor
    shift: Tensor
    share: float


def regressed(
    group: Group, numbers: Sequence[int], kept: Tensor, reads: Sequence[Read], rotation: Tensor
) -> list[Regression]:
    """The regression for each copy that some calls of one weight read.

    What a LayerNorm makes of the kept channels has no mean over them; neither have the channels that x is regressed on.
    """
    read, found = reads[numbers[0]], []
    for copy, strand in enumerate(group.strands.consumers[numbers[0]]):
        own, share = rotation[strand], 1.0
        mean, covariance = mixture([(reads[n].mean[copy], reads[n].covariance[copy]) for n in numbers])
        mean, covariance = own @ mean, own @ covariance @ own.T
        power = (covariance.diagonal() + mean.square()).mean()
        if read.centred:
            about = torch.eye(group.channels, dtype=mean.dtype)
            about[kept[:, None], kept] -= 1 / len(kept)
            covariance = about @ covariance @ about.T
        if read.normed:
            level = mean - own @ read.offset if read.constants else torch.zeros_like(mean)
            level = level - level[kept].mean() if read.centred else level
            share = float((covariance.diagonal() + level.square())[kept].mean().clamp(min=0).sqrt())
        if read.centred:
            covariance[kept[:, None], kept] += power / len(kept)  # nothing is regressed on the mean
        up, shift = cellwise_least_squares(mean, covariance, kept, group.cells, RIDGE)
        solid = read.constants and shift.square() > NULL**2 * power  # not for rounding: it adds a bias
        found.append(Regression(up, torch.where(torch.as_tensor(solid), shift, 0.0), share))
    return found
