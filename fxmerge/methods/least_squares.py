"""The least-squares problem that refit solves for a layer, from sums over rows.

For each of g blocks there are patches P (rows, p), targets T (rows, o) and the current weights W0 (o, p). With P and T
centred about their means, G = P'P / rows and R = P'T / rows:

    W' = argmin |P W' - T|^2 / rows + mu d |W' - W0|^2,     d = mean(diag G)
       = W0 + (G + mu d I)^-1 (R - G W0),                   b' = mean T - W' mean P

A layer that cannot have a bias (`centred=False`) is solved about zero instead. With fewer rows than columns, G is not
written: with X = P / sqrt(rows), G = X'X, and

    W' = W0 + X' (X X' + mu d I)^-1 (Y - X W0'),           Y = T / sqrt(rows)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxmerge.methods.linalg import Lifted, lifted

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes
CHUNK = 2048  # rows whose products are summed in the rows' own precision, but at least float32
BLOCK = 576  # columns of a Gram matrix that are multiplied at a time with those after them, as it is symmetric


@dataclass(frozen=True)
class System:
    """What a weight is solved from: moments of patches and targets about their means, or about zero, in float64."""

    count: float
    mean_p: Tensor  # (g, p)
    mean_t: Tensor  # (g, o)
    gram: Tensor  # (g, p, p)
    cross: Tensor  # (g, p, o)
    centred: bool = True

    def with_targets(self, rows: list[Tensor], targets: list[Tensor], reduce: Reduce) -> System:
        """The system of the same patches (rows, g, p) with other targets (rows, g, o), by batch."""
        mean = _mean(targets, self.count, reduce) * self.centred
        cross = reduce(_product(rows, self.mean_p, targets, mean)).div_(self.count)
        return replace(self, mean_t=mean, cross=cross)

    def lifted(self, ridge: float) -> Lifted:
        """G + mu d I of each block, factored: it serves all systems of the same patches."""
        return lifted(self.gram, ridge)

    def gap(self, start: Tensor) -> Tensor:
        """R - G W0 (g, p, o) for W0 `start`, (g, o, p)."""
        return self.cross - self.gram @ start.mT

    def solve(self, start: Tensor, factors: Lifted, gap: Tensor | None = None) -> Tensor:
        """W' (g, o, p) for W0 `start`; its `gap`, if it is known."""
        return start + factors.solve(self.gap(start) if gap is None else gap).mT

    def intercept(self, weight: Tensor, mean: Tensor) -> Tensor:
        """The bias (g, o) with which the outputs of `weight` have the mean `mean`, (g, o)."""
        return mean - torch.einsum("gop,gp->go", weight, self.mean_p)

    def variance(self, weight: Tensor) -> Tensor:
        """The variance of the outputs of `weight`: (g, o)."""
        return torch.einsum("gop,gpo->go", weight, self.gram @ weight.mT).clamp(min=0)


class FewRows(System):
    """The same with fewer rows n than columns: `gram` is X (g, n, p), and `cross` and gaps are Y and Y - X W0'."""

    def with_targets(self, rows: list[Tensor], targets: list[Tensor], reduce: Reduce) -> System:
        mean = _mean(targets, self.count, reduce) * self.centred
        return replace(self, mean_t=mean, cross=_scaled(targets, mean))

    def lifted(self, ridge: float) -> Lifted:
        n, p = self.gram.shape[1:]
        return lifted(self.gram @ self.gram.mT, ridge * n / p)  # X X' has the trace of G, over n entries

    def solve(self, start: Tensor, factors: Lifted, gap: Tensor | None = None) -> Tensor:
        return start + factors.solve(self.gap(start) if gap is None else gap).mT @ self.gram

    def variance(self, weight: Tensor) -> Tensor:
        return (self.gram @ weight.mT).square().sum(1)


def system(rows: list[Tensor], targets: list[Tensor], reduce: Reduce, centred: bool = True) -> System:
    """The system of patches (rows, g, p) and targets (rows, g, o), by batch."""
    count = _count(rows, reduce)
    mean_p, mean_t = _mean(rows, count, reduce) * centred, _mean(targets, count, reduce) * centred
    if _few(rows, count):
        return FewRows(count, mean_p, mean_t, _scaled(rows, mean_p), _scaled(targets, mean_t), centred)
    gram = reduce(_product(rows, mean_p, rows, mean_p)).div_(count)
    cross = reduce(_product(rows, mean_p, targets, mean_t)).div_(count)
    return System(count, mean_p, mean_t, gram, cross, centred)


def _few(rows: list[Tensor], count: float) -> bool:
    """Whether there are fewer rows than columns, all of them in this process."""
    own = sum(map(len, rows))
    return own == count and own < rows[0].size(2)


def _scaled(rows: list[Tensor], mean: Tensor) -> Tensor:
    """Rows (rows, g, p) about their mean, divided by the root of their number: (g, rows, p), float64."""
    whole = torch.cat(rows).double().sub_(mean).div_(max(sum(map(len, rows)), 1) ** 0.5)
    return whole.transpose(0, 1).contiguous()


def without_each(
    rows: list[Tensor], targets: list[Tensor], folds: list[Tensor], count: int, reduce: Reduce, centred: bool = True
) -> list[System]:
    """The systems of all rows but those of one fold, for each of `count` folds, from one pass over the rows.

    folds: (rows,) by batch, the fold of each row
    """
    whole_count = _count(rows, reduce)
    if _few(rows, whole_count):
        kept = ([(own != fold).nonzero().flatten() for own in folds] for fold in range(count))
        return [system(_chosen(rows, some), _chosen(targets, some), reduce, centred) for some in kept]
    middle = tuple(_mean(parts, whole_count, reduce) * centred for parts in (rows, targets))
    parts = []
    for fold in range(count):
        inside = [(own == fold).nonzero().flatten() for own in folds]
        own, wanted = _chosen(rows, inside), _chosen(targets, inside)
        number = _count(own, reduce)
        p, t = (_mean(of, 1.0, reduce) * centred - number * m for of, m in zip((own, wanted), middle, strict=True))
        gram, cross = (reduce(_product(own, middle[0], *of)) for of in ((own, middle[0]), (wanted, middle[1])))
        parts.append(_Sums(number, p, t, gram, cross))
    whole, found = sum(parts[1:], parts[0]), []
    while parts:  # of each fold, the sums are freed once its system is known
        found.append(whole.without(parts.pop(0), *middle))
    return found


def _chosen(rows: list[Tensor], index_of: list[Tensor]) -> list[Tensor]:
    return [x.index_select(0, i) for x, i in zip(rows, index_of, strict=True)]


@dataclass(frozen=True)
class _Sums:
    """Sums over rows of patches and targets, and of their products, about the means of all rows."""

    count: float
    p: Tensor  # (g, p)
    t: Tensor  # (g, o)
    gram: Tensor  # (g, p, p)
    cross: Tensor  # (g, p, o)

    def __add__(self, other: _Sums) -> _Sums:
        parts = ("p", "t", "gram", "cross")
        return _Sums(self.count + other.count, *(getattr(self, name) + getattr(other, name) for name in parts))

    def without(self, fold: _Sums, middle_p: Tensor, middle_t: Tensor) -> System:
        """The system of all rows but those of a fold. middle_p, middle_t: the means of all rows"""
        count = self.count - fold.count
        p, t = (self.p - fold.p) / count, (self.t - fold.t) / count
        gram = ((self.gram - fold.gram) / count).sub_(p[:, :, None] * p[:, None])
        cross = ((self.cross - fold.cross) / count).sub_(p[:, :, None] * t[:, None])
        return System(count, middle_p + p, middle_t + t, gram, cross)


def second_moments(rows: list[Tensor], reduce: Reduce) -> tuple[Tensor, Tensor]:
    """The mean of patches (rows, g, p) and their second moments about it: (g, p), (g, p, p), float64."""
    count = _count(rows, reduce)
    mean = _mean(rows, count, reduce)
    return mean, reduce(_product(rows, mean, rows, mean)).div_(count)


def _count(rows: list[Tensor], reduce: Reduce) -> float:
    return float(reduce(torch.tensor(float(sum(map(len, rows))), dtype=torch.float64, device=rows[0].device)))


def _mean(parts: list[Tensor], count: float, reduce: Reduce) -> Tensor:
    return reduce(torch.stack([_sum(part) for part in parts]).sum(0)) / count


def _sum(rows: Tensor) -> Tensor:
    """The sum of rows, float64: of CHUNK rows in their own precision, but at least float32, as long as it is finite."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    chunks = torch.split(rows, CHUNK)
    found = torch.stack([chunk.sum(0, dtype=precise) for chunk in chunks]).sum(0, dtype=torch.float64)
    return found if bool(found.isfinite().all()) else rows.sum(0, dtype=torch.float64)


def _product(rows: list[Tensor], mean: Tensor, others: list[Tensor], other_mean: Tensor) -> Tensor:
    """The sum over rows of (row - mean)' (other - other_mean): (g, p, o), float64.

    Rows are multiplied in their own precision, CHUNK at a time, and the products are summed in float64. As the means
    are subtracted first, nothing cancels, and rounding errors are far below the ridge. Where products overflow, they
    are computed in float64.
    """
    found = _summed_products(rows, mean, others, other_mean, torch.float32)
    if bool(found.isfinite().all()):
        return found
    return _summed_products(rows, mean, others, other_mean, torch.float64)


def _summed_products(
    rows: list[Tensor], mean: Tensor, others: list[Tensor], other_mean: Tensor, least: torch.dtype
) -> Tensor:
    square = all(other is row for row, other in zip(rows, others, strict=True))
    total = mean.new_zeros(*mean.shape, other_mean.size(-1))  # (g, p, o)
    for row, other in zip(rows, others, strict=True):
        for a, b in zip(torch.split(row, CHUNK), torch.split(other, CHUNK), strict=True):
            precise = torch.promote_types(torch.promote_types(a.dtype, b.dtype), least)
            one = (a.to(precise) - mean.to(precise)).transpose(0, 1)
            if not square:
                part = one.mT @ (b.to(precise) - other_mean.to(precise)).transpose(0, 1)
                total += part.real if part.is_complex() else part
                continue
            for first in range(0, one.size(2), BLOCK):
                last = first + BLOCK
                part = one[:, :, first:last].mT @ one[:, :, first:]
                total[:, first:last, first:] += part.real if part.is_complex() else part
    for first in range(BLOCK, total.size(1) if square else 0, BLOCK):
        total[:, first : first + BLOCK, :first] = total[:, :first, first : first + BLOCK].mT
    return total
