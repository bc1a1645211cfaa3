"""Elimination: which channels can go at the least loss once the consumers are re-solved.

A consumer computes W p from patches p, of which channel c has some columns. With H = G + ridge and G the second
moments of the patches about their mean, removing columns c and re-solving the others costs, summed over outputs,

    loss(c) = tr(W_c (H^-1_cc)^-1 W_c'),        W <- W - W_c (H^-1_cc)^-1 H^-1_c:,      H^-1 likewise

(Hassibi & Stork, 1993, "Optimal brain surgeon", equations 5 and 6, for blocks of columns). The cheapest goes, again and
again; several consumers' losses are added, each as a share of the variance of its own outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxmerge.methods.evidence import Reading

RIDGE = 1e-2  # of the mean diagonal
SHRINK = 0.1  # the share of removed columns at which matrices are copied without them
ROUNDS = 48  # at most so many times is the cheapest looked for; wide groups lose several channels at once


class _Consumer:
    def __init__(self, reading: Reading) -> None:
        gram, self.weight = reading.gram.double(), reading.weight.double().clone()
        self.inverse = _inverse(gram)
        self.left = torch.ones(len(gram), dtype=torch.bool)  # the columns that nobody has removed
        self.scale = float(((self.weight @ gram) * self.weight).sum().clamp(min=1e-300))
        self.columns, self.channels = reading.columns, reading.channels

    def losses(self, count: int) -> Tensor:
        """What each of the group's channels costs here: (count,), 0 where it is not read."""
        at = self.columns  # (m, q)
        own = self.weight[:, at].permute(1, 2, 0)  # (m, q, o)
        solved = torch.linalg.solve(self.inverse[at[:, :, None], at[:, None, :]], own)
        found = (own * solved).sum((1, 2)).cpu() / self.scale
        return torch.zeros(count, dtype=torch.float64).index_add_(0, self.channels, found)

    def remove(self, gone: Tensor) -> float:
        """What it costs here that these go together. gone: bool by channel of the group."""
        here = gone[self.channels]
        columns = self.columns[here].flatten()
        if not len(columns):
            return 0.0
        share = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])  # (q, p)
        solved = torch.linalg.solve(self.inverse[columns][:, columns], self.weight[:, columns].T)
        lost = float((self.weight[:, columns].T * solved).sum()) / self.scale
        self.weight.addmm_(self.weight[:, columns], share, alpha=-1)
        self.inverse.addmm_(self.inverse[:, columns], share, alpha=-1)
        self.columns, self.channels = self.columns[~here], self.channels[~here]
        self.left[columns] = False
        if self.left.sum() < (1 - SHRINK) * len(self.left):
            self._shrink()
        return lost

    def _shrink(self) -> None:
        """Rows and columns of H^-1 that were removed are of no further use."""
        self.columns = (torch.cumsum(self.left, 0) - 1)[self.columns]
        self.inverse, self.weight = self.inverse[self.left][:, self.left], self.weight[:, self.left]
        self.left = self.left[self.left]


def _inverse(gram: Tensor) -> Tensor:
    """(G + ridge)^-1; where rounding outweighs the ridge (inputs that hardly move), of G without what is below zero."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for change in (_as_it_is, _positive):
        found = change(gram)
        level = found.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(found + RIDGE * level * eye)
        if not bool(failed):
            return torch.cholesky_inverse(factor)
    return eye


def _as_it_is(gram: Tensor) -> Tensor:
    return gram


def _positive(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    positive: Tensor = (vectors * values.clamp(min=0)) @ vectors.T
    return positive


def eliminate(readings: Sequence[Reading], candidates: Tensor, count: int) -> Tensor:
    """Of `candidates` (indices into a group's channels) the places of those that stay, `count` of them, ascending."""
    left = torch.ones(len(candidates), dtype=torch.bool)
    for cheapest, _ in _descent(readings, candidates, len(candidates) - count):
        left[cheapest] = False
    return left.nonzero().flatten()


def curve(readings: Sequence[Reading], candidates: Tensor, least: int) -> Tensor:
    """What it costs that only k of `candidates` stay: (n + 1,) by k, infinite below `least`.

    The sum over consumers of the share of their outputs' variance that no re-solving brings back. One factorisation.
    """
    n = len(candidates)
    found = torch.full((n + 1,), torch.inf, dtype=torch.float64)
    found[n], left, total = 0.0, n, 0.0
    for cheapest, lost in _descent(readings, candidates, n - least):
        steps = torch.arange(1, len(cheapest) + 1) / len(cheapest)
        found[left - torch.arange(1, len(cheapest) + 1)] = total + lost * steps.double()
        left, total = left - len(cheapest), total + lost
    return found


def _descent(readings: Sequence[Reading], candidates: Tensor, drop: int) -> Iterator[tuple[Tensor, float]]:
    """(the places in `candidates` of those that go next, what that costs), until `drop` have gone."""
    consumers = [_Consumer(r) for r in readings]
    channels = 1 + max(int(candidates.max()), *(int(r.channels.max()) for r in readings))
    left = torch.ones(len(candidates), dtype=torch.bool)
    at_once = max(1, -(-drop // ROUNDS))
    while drop > 0:
        total = torch.stack([r.losses(channels) for r in consumers]).sum(0)[candidates]
        cheapest = torch.where(left, total, torch.inf).argsort(stable=True)[: min(at_once, drop)]
        left[cheapest] = False
        gone = torch.zeros(channels, dtype=torch.bool)
        gone[candidates[cheapest]] = True
        yield cheapest, sum(consumer.remove(gone) for consumer in consumers)
        drop -= len(cheapest)
