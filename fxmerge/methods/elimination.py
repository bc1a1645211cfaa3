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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxmerge.methods.evidence import Reading
from fxmerge.methods.generalisation import elsewhere

RIDGE = 1e-2  # of H, as a share of the mean diagonal of G
WIDE = 1024  # columns from which matrices are factored in float32, whose rounding errors are far below the ridge
OUTPUTS = 4096  # whose rows are multiplied at once, to bound the memory for copies of a head's weight
ROUNDS = 64  # in which a wide group loses all its channels; the order is the same however many are to be dropped


class _Consumer:
    """The weights W of consumers of one input, from which channels are removed, and what remains of H^-1.

    The matrix H^-1 itself is not written. If the removed columns c left H^-1 - F'F, with F = K^-1 H^-1_c: and K K' =
    H^-1_cc, then the rows of the next ones are computed from H^-1 and all F so far, and only the diagonal blocks of the
    channels that are left are kept up to date, as are their rows of W.
    """

    def __init__(self, readings: Sequence[Reading], candidates: Tensor, drop: int) -> None:
        """readings: of the same patches; candidates: the channels that may be removed; drop: the number of those that
        will be
        """
        reading = readings[0]
        precise = torch.float64 if len(reading.gram) < WIDE else torch.float32
        gram = reading.gram.to(precise)
        weight = _in_units(readings, gram)
        self.inverse, self.ridge = _inverse(gram)
        self.lost, self.independent = 0.0, reading.independent  # the loss so far, and independent rows of the readings
        # the number of columns that are left, and the sum of H^-1's diagonal there
        self.left, self.trace = len(gram), float(self.inverse.diagonal().sum(dtype=torch.float64))
        able = torch.isin(reading.channels, candidates.to(reading.channels))
        self.columns, self.channels = reading.columns[able], reading.channels[able]
        self.weight = weight[self.columns]  # (m, q, o)
        self.blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]].double()  # (m, q, q)
        most = drop * int(torch.bincount(reading.channels).max()) * self.columns.size(1)
        self.factors, self.known = gram.new_empty(min(most, len(gram)), len(gram)), 0  # all F, and their rows so far

    def losses(self, count: int) -> Tensor:
        """The loss of each of the group's channels here: (count,), 0 for channels that are not read."""
        if self.columns.size(1) == 1:
            found = torch.linalg.vector_norm(self.weight[:, 0], dim=1).double().square() / self.blocks[:, 0, 0]
        else:
            found = (torch.linalg.inv_ex(self.blocks)[0] * (self.weight @ self.weight.mT)).sum((1, 2))
        return torch.zeros(count, dtype=torch.float64).index_add_(0, self.channels, found.cpu())

    @property
    def expected(self) -> float:
        """The loss so far as it is on other rows than those of the readings."""
        return self.lost * elsewhere(self.left - self.ridge * self.trace, self.independent)

    def remove(self, removed: Tensor) -> None:
        """Remove channels. removed: bool, by channel of the group."""
        here = removed[self.channels]
        columns = self.columns[here].flatten()
        if not len(columns):
            return
        before = self.factors[: self.known]
        across = torch.addmm(self.inverse[columns], before[:, columns].T, before, alpha=-1)  # (c, p) of H^-1 as it is
        root = _inverse_root(across[:, columns])
        own = self.factors[self.known : self.known + len(columns)]
        torch.mm(root, across, out=own)
        share = root @ self.weight[here].flatten(0, 1)  # (c, o)
        self.lost += float(share.square().sum(dtype=torch.float64))
        self.known, self.left = self.known + len(columns), self.left - len(columns)
        self.trace -= float(own.square().sum(dtype=torch.float64))
        self.columns, self.channels = self.columns[~here], self.channels[~here]
        parts = own[:, self.columns.flatten()].T  # (m q, c)
        self.weight = self.weight[~here]
        self.weight.view(len(parts), -1).addmm_(parts, share, alpha=-1)
        parts = parts.reshape(*self.columns.shape, -1)
        self.blocks = self.blocks[~here]
        self.blocks -= parts @ parts.mT if parts.size(1) > 1 else parts.double().square().sum(2, keepdim=True)


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


def _of_one_input(readings: Sequence[Reading]) -> list[list[Reading]]:
    """The readings of the same patches together, as of queries, keys and values."""
    found: dict[tuple[Any, ...], list[Reading]] = {}
    for r in readings:
        where = tuple(r.channels.tolist()), tuple(r.columns.flatten().tolist())
        found.setdefault((id(r.gram), *where), []).append(r)
    return [*found.values()]


def _in_units(readings: Sequence[Reading], gram: Tensor) -> Tensor:
    """The weights (p, outputs) of consumers, each divided by the deviation of its outputs; `gram`: of their patches.

    Where they have more outputs than columns, (p, p) with the same products of rows, on which alone losses depend.
    """
    if sum(len(r.weight) for r in readings) > len(gram):
        return _root(torch.stack([_products(r.weight, gram) for r in readings]).sum(0)).to(gram)
    found = []
    for r in readings:
        weight = r.weight.T.to(gram)
        variance = ((gram @ weight) * weight).sum(dtype=torch.float64)
        found.append(weight / variance.clamp(min=1e-300).sqrt().to(weight))
    return torch.cat(found, 1)


def _products(weight: Tensor, gram: Tensor) -> Tensor:
    """W'W (p, p) of a weight (o, p), divided by the variance of its outputs."""
    found = torch.zeros_like(gram, dtype=torch.float64)
    for some in torch.split(weight, OUTPUTS):
        rows = some.to(gram)
        found += (rows.T @ rows).double()
    return found / (gram * found).sum().clamp(min=1e-300)


def _root(products: Tensor) -> Tensor:
    """R (p, p) with R R' = products, which are positive semidefinite."""
    root, failed = torch.linalg.cholesky_ex(products)
    if bool(failed):
        values, vectors = torch.linalg.eigh(products)
        root = vectors * values.clamp(min=0).sqrt()
    found: Tensor = root
    return found


def _inverse(gram: Tensor) -> tuple[Tensor, float]:
    """(G + ridge)^-1, and the ridge.

    Where G has negative eigenvalues beyond the ridge by rounding, as for inputs that are nearly constant, these are set
    to zero first.
    """
    for change in (_as_it_is, _positive):
        found = change(gram)
        diagonal = found.diagonal()
        level = diagonal.mean().clamp(min=torch.finfo(gram.dtype).tiny / RIDGE)
        found = torch.diagonal_scatter(found, diagonal + RIDGE * level)  # a view of a stored tensor cannot be written
        factor, failed = torch.linalg.cholesky_ex(found)
        if not bool(failed):
            return torch.cholesky_inverse(factor), RIDGE * float(level)
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device), 0.0


def _as_it_is(gram: Tensor) -> Tensor:
    return gram


def _positive(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram.double())
    positive: Tensor = (vectors * values.clamp(min=0)) @ vectors.T
    return positive.to(gram)


def _inverse_root(block: Tensor) -> Tensor:
    """K^-1 (c, c) for positive definite blocks K K', whatever rounding has made of their smallest eigenvalues."""
    values, vectors = torch.linalg.eigh(block.double())
    values = values.clamp(min=torch.finfo(block.dtype).eps * float(values[-1]))
    root: Tensor = (vectors / values.sqrt()).T
    return root.to(block)


@dataclass(frozen=True)
class Order:
    """The order in which candidates are removed, as far as it is known.

    removed: (drop,) positions in the candidates
    losses:  (drop,) the expected loss once each of them is gone
    """

    removed: Tensor
    losses: Tensor


class Orders:
    """The orders that are known. One that has been computed for many channels to drop also tells of fewer."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[Reading, ...], Order]] = {}

    def of(self, readings: Sequence[Reading], candidates: Tensor, drop: int) -> Order:
        """The order of the first `drop` of the candidates (indices of a group's channels), at least."""
        key = tuple(map(id, readings)), tuple(candidates.tolist())
        _, found = self._known.get(key, (None, None))
        if found is None or len(found.removed) < drop:
            found = _order(readings, candidates, drop)
            self._known[key] = tuple(readings), found  # with the readings, whose identities then stay theirs
        return found


def eliminate(readings: Sequence[Reading], candidates: Tensor, count: int, orders: Orders | None = None) -> Tensor:
    """The `count` of the candidates (indices of a group's channels) to keep: positions in `candidates`, ascending."""
    drop = len(candidates) - count
    left = torch.ones(len(candidates), dtype=torch.bool)
    left[(orders or Orders()).of(readings, candidates, drop).removed[:drop]] = False
    return left.nonzero().flatten()


def curve(readings: Sequence[Reading], candidates: Tensor, least: int, orders: Orders | None = None) -> Tensor:
    """The loss at which only k of `candidates` are kept: (n + 1,) by k, infinite below `least`.

    It is the share of the variance of a consumer's outputs that re-solving cannot recover on rows that it was not
    solved on (see `generalisation`), summed over the consumers. All k take one factorisation.
    """
    n = len(candidates)
    losses = (orders or Orders()).of(readings, candidates, n - least).losses[: n - least]
    found = torch.full((n + 1,), torch.inf, dtype=torch.float64)
    found[least:] = torch.cat([losses.flip(0), losses.new_zeros(1)])
    return found


def _order(readings: Sequence[Reading], candidates: Tensor, drop: int) -> Order:
    removed, losses, total = [candidates.new_zeros(0)], [torch.zeros(0, dtype=torch.float64)], 0.0
    for cheapest, now in _descent(readings, candidates, drop):
        steps = torch.arange(1, len(cheapest) + 1, dtype=torch.float64) / len(cheapest)
        removed.append(cheapest)
        losses.append(total + (now - total) * steps)
        total = now
    return Order(torch.cat(removed), torch.cat(losses))


def _descent(readings: Sequence[Reading], candidates: Tensor, drop: int) -> Iterator[tuple[Tensor, float]]:
    """Yields (positions in `candidates` of the channels removed next, the expected loss of all that are removed by
    then), until `drop` are removed.
    """
    consumers: list[_Consumer | _Sum] = [_Sum(r) for r in readings if not r.solved]
    consumers += [_Consumer(same, candidates, drop) for same in _of_one_input([r for r in readings if r.solved])]
    channels = 1 + max(int(candidates.max()), *(int(r.channels.max()) for r in readings))
    left = torch.ones(len(candidates), dtype=torch.bool)
    at_once = max(1, len(candidates) // ROUNDS)
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
