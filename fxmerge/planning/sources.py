"""What a group's channels are the sum of: the outputs of its producers, each after its own steps."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from fxmerge.ir.groups import Group
from fxmerge.methods import linalg
from fxmerge.planning.channel_ops import Step


@dataclass(frozen=True)
class Source:
    """What some producers add to a group's channels: f(x), where x is Gaussian and f the nonlinear steps, if any.

    share:       (n,) how much of f(x) is in each channel (`shares`)
    mean:        (n,) of x, for white input
    covariance:  (n, n) of x
    functions:   the steps from the first nonlinear one to the common coordinates
    """

    share: Tensor
    mean: Tensor
    covariance: Tensor
    functions: tuple[Step, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.share.sign() * self.share.abs().sqrt()

    @property
    def weighted_covariance(self) -> Tensor:
        return self.weight[:, None] * self.covariance * self.weight

    def samples(self, count: int, trained: bool, generator: torch.Generator) -> Tensor:
        """(count, n) samples of what is added."""
        points = linalg.coordinates(self.covariance)
        noise = torch.randn(count // 2, points.size(1), generator=generator, dtype=torch.float64)
        values = torch.cat([noise, -noise]) @ points.T + self.mean
        for step in self.functions:
            values = step.of_samples(values, trained)
        mean = values.mean(0)  # a share 1 / k of k outputs in turn has the mean of their variances
        return (values - mean) * self.weight + mean * self.share


def shares(group: Group) -> list[Tensor]:
    """How much of each producer's output is in a group's channels, by producer: (n,).

    1 where outputs are added, -1 where they are subtracted, and 1 / k where a channel is one of k outputs.
    """
    n, count = group.channels, len(group.producers)
    if not group.meetings:
        return [torch.ones(n, dtype=torch.float64)] * count
    present = [torch.zeros(n, dtype=torch.bool).index_fill_(0, p.channels, True) for p in group.producers]
    for meeting in group.meetings:
        present.append(torch.stack([present[o] for o in meeting.operands]).any(0))
    found = [torch.zeros(n, dtype=torch.float64) for _ in present]
    found[-1] = torch.ones(n, dtype=torch.float64)
    for number, meeting in reversed([*enumerate(group.meetings, count)]):
        held = torch.stack([present[o] for o in meeting.operands]).double()
        each = held / held.sum(0).clamp(min=1) if meeting.op == "either" else held
        for place, operand in enumerate(meeting.operands):
            sign = -1.0 if meeting.op == "sub" and place else 1.0
            own = sign * found[number] * each[place]
            found[operand] = torch.where(own.abs() > found[operand].abs(), own, found[operand])
    return found[:count]


def covariance_of(sources: Sequence[Source]) -> Tensor:
    """(n, n) of a sum of independent sources, before their functions."""
    return reduce(operator.add, (s.weighted_covariance for s in sources))


def _called_again(group: Group) -> bool:
    """Whether a channel is the output of one of several calls of the same layers, each with all channels."""
    weights = {p.layer.params["weight"] for p in group.producers}
    whole = all(len(p.channels) == group.channels for p in group.producers)
    return len(weights) == 1 and whole and all(meeting.op == "either" for meeting in group.meetings)


def added(group: Group, sources: Sequence[Source]) -> tuple[Source, ...]:
    """The same channels from fewer sources, of which there is one for each producer, or none."""
    if sources and _called_again(group):
        return (replace(sources[0], share=torch.ones_like(sources[0].share)),)
    plain = [s for s in sources if not s.functions]
    if len(plain) < 2:
        return tuple(sources)
    # a sum of Gaussians that nothing follows is a Gaussian
    mean = reduce(operator.add, (s.share * s.mean for s in plain))
    return Source(torch.ones_like(mean), mean, covariance_of(plain)), *(s for s in sources if s.functions)
