"""The linear algebra that several stages share: tensors in, tensors out, float64, no graphs."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(rows: Tensor, kept: Tensor | None = None) -> Tensor:
    """Inner products of rows: (n, d) -> (n, n), float64.

    kept: only those of rows that are not kept with rows that are, and the diagonal; elsewhere 0. That is all that
    looking for a partner takes, a quarter of the work, and the rows' own precision (float32 at least) will do.
    """
    if kept is None:
        rows = rows.double()
        inner: Tensor = rows @ rows.T
        return inner
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    inner = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    dropped = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, kept, False).nonzero().flatten()
    inner[dropped[:, None], kept[None, :]] = (rows[dropped] @ rows[kept].T).double()
    inner.diagonal().copy_(torch.linalg.vector_norm(rows, dim=1).double().square())
    return inner


def distances(rows: Tensor) -> Tensor:
    """Euclidean distances between rows: (n, d) -> (n, n), float64, zero on the diagonal."""
    inner = gram(rows.double())
    square = inner.diagonal()
    found = (square[:, None] + square[None, :] - 2 * inner).clamp_(min=0).sqrt_()
    return found.fill_diagonal_(0)


def coordinates(inner: Tensor) -> Tensor:
    """Points (n, r) whose inner products are `inner` (n, n): the rows of a square root, null directions left out."""
    values, vectors = torch.linalg.eigh(inner)
    solid = values > values[-1].clamp(min=0) * 1e-12
    points: Tensor = vectors[:, solid] * values[solid].sqrt()
    return points


def solve_ridge(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """X = (A + ridge * mean(diag A) I)^-1 B for symmetric positive semidefinite A (p, p) and B (p, q), float64.

    Cholesky; where A is singular even so, the least-norm solution by eigenvalues.
    """
    shift = ridge * float(normal.diagonal().mean().clamp(min=0)) + torch.finfo(torch.float64).tiny
    lifted = normal + shift * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    factor, failed = torch.linalg.cholesky_ex(lifted)
    if not bool(failed):
        return torch.cholesky_solve(right, factor)
    least: Tensor = torch.linalg.pinv(lifted, hermitian=True) @ right
    return least
