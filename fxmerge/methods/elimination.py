"""Elimination: which channels can be removed at the least loss once the consumers are re-solved.

A consumer computes W p from patches p, in which channel c has some of the columns. Let H = G + ridge, with G the second
moments of the patches about their mean. Removing the columns of c and re-solving the others costs, summed over outputs,

    loss(c) = tr(W_c (H^-1_cc)^-1 W_c'),        W <- W - W_c (H^-1_cc)^-1 H^-1_c:,      H^-1 likewise

(Hassibi & Stork, 1993, "Optimal brain surgeon", equations 5 and 6, for blocks of columns). The channel with the least
loss is removed, repeatedly. The losses at several consumers are added, each as a share of the variance of the
consumer's own outputs. Where a consumer is not solved again, as the scores of queries and keys, removing the columns u
altogether costs u' (G o W'W) u, with 1 in u for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxmerge.methods.evidence import Reading
from fxmerge.methods.generalisation import elsewhere

RIDGE = 1e-2  # of H, as a share of the mean diagonal of G
SHRINK = 0.1  # the share of removed columns at which the matrices are copied without them
ROUNDS = 48  # at most; in a wide group, several channels are removed in each round


class _Consumer:
    """The weights W and H^-1 of one consumer, from which channels are removed."""

    def __init__(self, reading: Reading) -> None:
        gram, self.weight = reading.gram.double(), reading.weight.double().clone()
        self.inverse, self.ridge = _inverse(gram)
        self.lost, self.independent = 0.0, reading.independent  # the loss so far, and independent rows of the readings
        self.left = torch.ones(len(gram), dtype=torch.bool)  # the columns that have not been removed
        self.scale = float(((self.weight @ gram) * self.weight).sum().clamp(min=1e-300))
        self.columns, self.channels = reading.columns, reading.channels

    def losses(self, count: int) -> Tensor:
        """The loss of each of the group's channels at this consumer: (count,), 0 for channels that it does not read."""
        at = self.columns  # (m, q)
        own = self.weight[:, at].permute(1, 2, 0)  # (m, q, o)
        solved = torch.linalg.solve(self.inverse[at[:, :, None], at[:, None, :]], own)
        found = (own * solved).sum((1, 2)).cpu() / self.scale
        return torch.zeros(count, dtype=torch.float64).index_add_(0, self.channels, found)

    @property
    def expected(self) -> float:
        """The loss so far as it is on other rows than those of the readings."""
        freedom = float(self.left.sum()) - self.ridge * float(self.inverse.diagonal().sum())
        return self.lost * elsewhere(freedom, self.independent)

    def remove(self, removed: Tensor) -> None:
        """Remove channels. removed: bool, by channel of the group."""
        here = removed[self.channels]
        columns = self.columns[here].flatten()
        if not len(columns):
            return
        share = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])  # (q, p)
        solved = torch.linalg.solve(self.inverse[columns][:, columns], self.weight[:, columns].T)
        self.lost += float((self.weight[:, columns].T * solved).sum()) / self.scale
        self.weight.addmm_(self.weight[:, columns], share, alpha=-1)
        self.inverse.addmm_(self.inverse[:, columns], share, alpha=-1)
        self.columns, self.channels = self.columns[~here], self.channels[~here]
        self.left[columns] = False
        if self.left.sum() < (1 - SHRINK) * len(self.left):
            self._shrink()

    def _shrink(self) -> None:
        """Copy the matrices without the removed columns."""
        self.columns = (torch.cumsum(self.left, 0) - 1)[self.columns]
        self.inverse, self.weight = self.inverse[self.left][:, self.left], self.weight[:, self.left]
        self.left = self.left[self.left]


class _Sum:
    """The outputs W p of a consumer that is not solved again, without some of its columns."""

    def __init__(self, reading: Reading) -> None:
        gram, weight = reading.gram.double(), reading.weight.double()
        self.products = gram * (weight.T @ weight)  # (p, p) second moments of what the columns contribute
        self.scale = float(self.products.sum().clamp(min=1e-300))
        self.gone = torch.zeros(len(gram), dtype=torch.float64, device=gram.device)
        self.columns, self.channels = reading.columns, reading.channels

    def losses(self, count: int) -> Tensor:
        """The change of the loss with each of the group's channels: (count,), 0 for channels that are not summed."""
        at = self.columns  # (m, q)
        own = self.products[at[:, :, None], at[:, None, :]].sum((1, 2)) + 2 * (self.products @ self.gone)[at].sum(1)
        return torch.zeros(count, dtype=torch.float64).index_add_(0, self.channels, own.cpu() / self.scale)

    @property
    def expected(self) -> float:
        """The loss so far."""
        return float(self.gone @ self.products @ self.gone) / self.scale

    def remove(self, removed: Tensor) -> None:
        """Remove channels. removed: bool, by channel of the group."""
        here = removed[self.channels]
        self.gone[self.columns[here].flatten()] = 1
        self.columns, self.channels = self.columns[~here], self.channels[~here]


def _inverse(gram: Tensor) -> tuple[Tensor, float]:
    """(G + ridge)^-1, and the ridge.

    Where G has negative eigenvalues beyond the ridge by rounding, as for inputs that are nearly constant, these are set
    to zero first.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for change in (_as_it_is, _positive):
        found = change(gram)
        level = found.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(found + RIDGE * level * eye)
        if not bool(failed):
            return torch.cholesky_inverse(factor), RIDGE * float(level)
    return eye, 0.0


def _as_it_is(gram: Tensor) -> Tensor:
    return gram


def _positive(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    positive: Tensor = (vectors * values.clamp(min=0)) @ vectors.T
    return positive


def eliminate(readings: Sequence[Reading], candidates: Tensor, count: int) -> Tensor:
    """The `count` of the candidates (indices of a group's channels) to keep: positions in `candidates`, ascending."""
    left = torch.ones(len(candidates), dtype=torch.bool)
    for cheapest, _ in _descent(readings, candidates, len(candidates) - count):
        left[cheapest] = False
    return left.nonzero().flatten()


def curve(readings: Sequence[Reading], candidates: Tensor, least: int) -> Tensor:
    """The loss at which only k of `candidates` are kept: (n + 1,) by k, infinite below `least`.

    It is the share of the variance of a consumer's outputs that re-solving cannot recover on rows that it was not
    solved on (see `generalisation`), summed over the consumers. All k take one factorisation.
    """
    n = len(candidates)
    found = torch.full((n + 1,), torch.inf, dtype=torch.float64)
    found[n], left, total = 0.0, n, 0.0
    for cheapest, now in _descent(readings, candidates, n - least):
        steps = torch.arange(1, len(cheapest) + 1) / len(cheapest)
        found[left - torch.arange(1, len(cheapest) + 1)] = total + (now - total) * steps.double()
        left, total = left - len(cheapest), now
    return found


def _descent(readings: Sequence[Reading], candidates: Tensor, drop: int) -> Iterator[tuple[Tensor, float]]:
    """Yields (positions in `candidates` of the channels removed next, the expected loss of all that are removed by
    then), until `drop` are removed.
    """
    consumers = [_Consumer(r) if r.solved else _Sum(r) for r in readings]
    channels = 1 + max(int(candidates.max()), *(int(r.channels.max()) for r in readings))
    left = torch.ones(len(candidates), dtype=torch.bool)
    at_once = max(1, -(-drop // ROUNDS))
    while drop > 0:
        total = torch.stack([r.losses(channels) for r in consumers]).sum(0)[candidates]
        cheapest = torch.where(left, total, torch.inf).argsort(stable=True)[: min(at_once, drop)]
        left[cheapest] = False
        removed = torch.zeros(channels, dtype=torch.bool)
        removed[candidates[cheapest]] = True
        for consumer in consumers:
            consumer.remove(removed)
        yield cheapest, sum(consumer.expected for consumer in consumers)
        drop -= len(cheapest)
