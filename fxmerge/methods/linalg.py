"""Linear algebra that several stages use: Gram matrices, distances, ridge regression, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITE = 32  # rows of a weight that are processed at a time, so that intermediate results stay in the cache


@dataclass(frozen=True)
class Pairs:
    """The inner products that are needed to find partners, a quarter of all or less."""

    across: Tensor  # (m, k) of the dropped rows with the kept ones, both ascending
    square: Tensor  # (n,) of each row with itself

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self.across + other.across, self.square + other.square)

    def __mul__(self, other: Pairs) -> Pairs:
        return Pairs(self.across * other.across, self.square * other.square)


def precise(values: Tensor) -> Tensor:
    """The values in float64, or in complex128 if they are complex."""
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def as_real(values: Tensor) -> Tensor:
    """Complex values (n, ..., d) as their real and imaginary parts, (n, ..., 2 d); real values unchanged."""
    return torch.view_as_real(values.resolve_conj()).flatten(-2) if values.is_complex() else values


def gram(rows: Tensor) -> Tensor:
    """Inner products of rows: (n, d) -> (n, n), float64."""
    rows = rows.double()
    inner: Tensor = rows @ rows.T
    return inner


def others(kept: Tensor, n: int) -> Tensor:
    """The numbers below n that are not in `kept`, ascending."""
    return torch.ones(n, dtype=torch.bool).index_fill_(0, kept, False).nonzero().flatten()


def across(rows: Tensor, kept: Tensor) -> Pairs:
    """Inner products of the dropped rows with the kept ones, returned as float64.

    They are computed in the rows' own precision, but at least float32: a difference of 1e-7 does not matter for the
    choice of a partner.
    """
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    one, other = others(kept, len(rows)).to(rows.device), kept.to(rows.device)
    products, square = rows.new_zeros(len(one), len(other)), rows.new_zeros(len(rows), dtype=torch.float64)
    for some in torch.split(rows, 16 * BITE, dim=1):  # some columns at a time, so that never half of a weight is copied
        products.addmm_(some.index_select(0, one), some.index_select(0, other).T)
        square += torch.linalg.vector_norm(some, dim=1).double().square()
    return Pairs(products.double(), square)


def pairs(inner: Tensor | Pairs, dropped: Tensor, kept: Tensor) -> Pairs:
    """The inner products of the dropped rows with the kept ones, from those of all rows or as they are."""
    if isinstance(inner, Pairs):
        return inner
    return Pairs(inner[dropped[:, None], kept[None, :]], inner.diagonal())


def distances(rows: Tensor) -> Tensor:
    """Euclidean distances between rows: (n, d) -> (n, n), float64, zero on the diagonal."""
    inner = gram(rows.double())
    square = inner.diagonal()
    found = (square[:, None] + square[None, :] - 2 * inner).clamp_(min=0).sqrt_()
    return found.fill_diagonal_(0)


def coordinates(inner: Tensor) -> Tensor:
    """Points (n, r) whose inner products are `inner` (n, n): the rows of a square root, without null directions."""
    values, vectors = torch.linalg.eigh(inner)
    solid = values > values[-1].clamp(min=0) * 1e-12
    points: Tensor = vectors[:, solid] * values[solid].sqrt()
    return points


@dataclass(frozen=True)
class Lifted:
    """A + ridge * mean(diag A) I for symmetric positive semidefinite A (..., p, p), factored for any right sides."""

    factor: Tensor  # of Cholesky; the pseudoinverse where a matrix is singular nevertheless
    singular: bool

    def solve(self, right: Tensor) -> Tensor:
        """X (..., p, q) for right sides (..., p, q); the least-norm solution where a matrix is singular."""
        return self.factor @ right if self.singular else torch.cholesky_solve(right, self.factor)


def lifted(normal: Tensor, ridge: float) -> Lifted:
    """A + ridge * mean(diag A) I for symmetric positive semidefinite A (..., p, p), float64."""
    moved = _raised(normal, ridge)
    failed = torch.empty(normal.shape[:-2], dtype=torch.int32, device=normal.device)
    factor, failed = torch.linalg.cholesky_ex(moved, out=(moved, failed))  # without another copy
    if not bool(failed.any()):
        return Lifted(factor, singular=False)
    return Lifted(torch.linalg.pinv(_raised(normal, ridge), hermitian=True), singular=True)


def _raised(normal: Tensor, ridge: float) -> Tensor:
    moved = normal.mT.contiguous().mT  # a copy, in the order of LAPACK
    diagonal = moved.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean(-1, keepdim=True).clamp(min=0) + torch.finfo(torch.float64).tiny
    return moved


def solve_ridge(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """X = (A + ridge * mean(diag A) I)^-1 B for symmetric positive semidefinite A (p, p) and B (p, q), float64.

    It is solved by Cholesky; if the matrix is singular nevertheless, by the pseudoinverse (the least-norm solution).
    """
    return lifted(normal, ridge).solve(right)
