"""What a least-squares fit loses on rows that it was not fitted to, from its rows alone.

A ridge regression on p columns has df = tr G (G + ridge I)^-1 degrees of freedom. If its mean square error on the N
independent rows that it was fitted to is E, the error on others is about

    E / (1 - df / N)^2                              (generalised cross-validation: Golub, Heath & Wahba, 1979)

Positions of one image are not independent, and a few large rows may rule all sums. The number of independent rows that
would determine the moments as well is estimated from how much the correlations r_ij differ between K blocks of whole
samples. For N independent Gaussian rows, Var(r_ij) = (1 + r_ij^2) / N in units of the deviations, so

    N = sum_i!=j (1 + r_ij^2) / sum_i!=j Var(r_ij)
    Var(r) = K / (K - 1) sum_b w_b^2 (r_b - r)^2    w_b: the share of the rows that are in block b

Correlations that are estimated from N rows are too large on average. Multiplied by 1 - a, they have the least expected
square error (Schaefer & Strimmer, "A shrinkage approach to large-scale covariance matrix estimation", 2005, section 2):

    a = sum_i!=j Var(r_ij) / sum_i!=j r_ij^2

N is estimated on a sample of the columns, whose pairs are many enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmerge.methods.least_squares import Reduce

BLOCKS = 8  # of each process
COLUMNS = 128  # of each of the patches' blocks, at most, on which N is estimated
WORST = 0.05  # the smallest value of 1 - df / N


def elsewhere(df: float, rows: float) -> float:
    """The factor by which the error on other rows exceeds that on the `rows` independent ones of a fit."""
    free = max(WORST, 1 - df / rows)
    return 1 / (free * free)


def shrunk(covariance: Tensor, rows: float) -> Tensor:
    """A covariance (n, n), estimated from `rows` independent rows, with its correlations multiplied by 1 - a."""
    found = covariance * (1 - shrinkage(covariance, rows))
    found.diagonal().copy_(covariance.diagonal())
    return found


def shrinkage(covariance: Tensor, rows: float) -> float:
    """The share a of the correlations of a covariance (n, n) that is due to its `rows` being few."""
    inverse = _inverse_deviations(covariance)
    correlations = covariance * inverse[:, None] * inverse[None, :]
    squares, solid = float(correlations.fill_diagonal_(0).square().sum()), int((inverse > 0).sum())
    pairs = solid * (solid - 1) + squares
    return min(1.0, pairs / rows / max(squares, 1e-300))


def independent_rows(rows: list[Tensor], mean: Tensor, second: Tensor, reduce: Reduce) -> float:
    """N for patches (rows, g, p) by batch, in the order of samples, with the moments `mean` (g, p), `second` (g, p, p).

    It is at most the number of rows, and at least 1.
    """
    some = _some_columns(second)
    mean, second = mean[:, some], second[:, some][:, :, some]
    inverse = _inverse_deviations(second)
    precise = torch.promote_types(rows[0].dtype, torch.float32)
    centre, scale = mean.to(precise), inverse.to(precise)
    solid = inverse > 0
    whole = second * inverse[:, :, None] * inverse[:, None, :]
    whole.diagonal(dim1=1, dim2=2).zero_()
    total = float(reduce(second.new_tensor(float(sum(map(len, rows))))))
    varied, blocks = second.new_zeros(()), 0
    for block in pieces(rows):
        count = sum(map(len, block))
        own = torch.zeros_like(second)
        for part in block:
            z = (part.index_select(2, some).to(precise) - centre).mul_(scale).transpose(0, 1)
            own += (z.mT @ z).double() / count
        own.diagonal(dim1=1, dim2=2).zero_()
        varied, blocks = varied + (count / total) ** 2 * (own - whole).square().sum(), blocks + 1
    spread, several = map(float, reduce(torch.stack([varied, second.new_tensor(float(blocks))])))
    pairs = float((solid.sum(1) * (solid.sum(1) - 1)).sum() + whole.square().sum())
    if several < 2 or pairs <= 0:
        return max(1.0, total)
    return min(max(1.0, total), max(1.0, pairs / max(several / (several - 1) * spread, 1e-300)))


def _some_columns(second: Tensor) -> Tensor:
    """The numbers of COLUMNS columns of second moments (g, p, p), the same on every process; of all if there are fewer.

    They are drawn: the columns of a convolution's patches have a period.
    """
    count = second.size(-1)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:COLUMNS].sort().values
    return drawn.to(second.device)


def pieces(rows: list[Tensor]) -> list[list[Tensor]]:
    """BLOCKS consecutive pieces of nearly equally many rows, whatever batches the rows come in; empty ones left out."""
    total = sum(map(len, rows))
    bounds = [total * number // BLOCKS for number in range(BLOCKS + 1)]
    found: list[list[Tensor]] = [[] for _ in range(BLOCKS)]
    start = 0
    for part in rows:
        for piece, low, high in zip(found, bounds[:-1], bounds[1:], strict=True):
            own = part[max(low - start, 0) : max(high - start, 0)]
            if len(own):
                piece.append(own)
        start += len(part)
    return [piece for piece in found if piece]


def _inverse_deviations(second: Tensor) -> Tensor:
    """1 / deviation for second moments about the mean (..., p, p): (..., p), 0 where a column is constant."""
    deviation = second.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    solid = deviation > deviation.max() * 1e-9
    return torch.where(solid, 1 / torch.where(solid, deviation, 1), 0)
