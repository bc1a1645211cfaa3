"""Principal components of a group's channels, where any matrix may mix them: x ~ up @ (down @ x) + shift.

Let x have the second moments C (n, n), and let its consumers compute W x, with M = sum of W'W (n, n). Among all pairs
of rank k, the loss E |W (x - up down x)|^2 = tr(M (I - P) C (I - P)'), P = up down, is least for

    M^1/2 C^1/2 = U S V',    down = U_k' M^1/2,    up = C^1/2 V_k S_k^-1,    loss = the sum of s_i^2 for i > k

(Eckart & Young, 1936, applied to M^1/2 P C^1/2). With M = I these are the principal components of x.

Only the span of the rows of `down` matters, as the best `up` for it is the regression of x on down x. So `rotation`
returns an orthogonal B (n, n) whose first k rows span those of `down` for each k: the Q of a QR decomposition of
M^1/2 U. A rotation by B changes nothing that a model computes, nor the norms and inner products of other groups' rows,
and is as exact as the weights are; what is left to do is to drop channels of the rotated group.

A LayerNorm that reads the channels leaves fewer rotations (`centred_rotation`).

M is restricted to the range of C first, which changes no loss. Then B's first rows span this range, or what the
consumers read of it, so that at the rank of C, or of M, dropping the other channels is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.methods.generalisation import elsewhere
from fxmerge.methods.linalg import solve_ridge

NULL = 1e-12  # the share of the largest eigenvalue below which a direction is not in the range of a matrix
EXACT = 1e-9  # the share of what consumers compute below which a loss is rounding
RIDGE = 1e-10  # of regressions on kept channels


@dataclass(frozen=True)
class Cell:
    """The components of the channels of one cell in one strand, which may be mixed.

    cell, strand: their numbers
    channels:  (m,) the group's channels in the cell, ascending; component i takes the place of channels[i]
    rotation:  (m, m) orthogonal: its rows are the components, those that consumers would miss most first
    powers:    (m,) what each of them adds to what the consumers compute: s_i^2, descending
    covariance, mass: C and M, (m, m)
    """

    cell: int
    strand: int
    channels: Tensor
    rotation: Tensor
    powers: Tensor
    covariance: Tensor
    mass: Tensor


@dataclass(frozen=True)
class Components:
    """The components of a group, by cell and strand, and the number of independent rows that its moments come from."""

    cells: tuple[Cell, ...]
    independent: float

    @property
    def rotation(self) -> Tensor:
        """(strands, n, n), orthogonal: B of all cells."""
        n = sum(len(cell.channels) for cell in self.cells if cell.strand == 0)
        found = torch.zeros(1 + max(cell.strand for cell in self.cells), n, n, dtype=torch.float64)
        for cell in self.cells:
            found[cell.strand, cell.channels[:, None], cell.channels] = cell.rotation
        return found

    def first(self, counts: tuple[int, ...]) -> Tensor:
        """The channels of the rotated group that are kept: in each cell, as many as `counts` says. Ascending."""
        return torch.cat([c.channels[: counts[c.cell]] for c in self.cells if c.strand == 0]).sort().values

    def share(self, counts: tuple[int, ...]) -> float:
        """The share that the kept components hold of what the consumers compute; 1 if that is nothing."""
        held = sum(float(c.powers[: counts[c.cell]].sum()) for c in self.cells)
        whole = sum(float(c.powers.sum()) for c in self.cells)
        return held / whole if whole > 0 else 1.0

    def curve(self, cell: int) -> Tensor:
        """The loss in a cell at which only k of its m components are kept, on other rows: (m + 1,) by k."""
        powers = torch.stack([c.powers for c in self.cells if c.cell == cell]).sum(0)  # of all strands
        lost = powers.sum() - torch.cat([powers.new_zeros(1), powers.cumsum(0)])
        lost = torch.cat([lost[:-1].clamp(min=0), lost.new_zeros(1)])
        n = len(powers)
        factors = [elsewhere(_freedom(k, n), self.independent) for k in range(n + 1)]
        return lost * lost.new_tensor(factors)

    def lose_less(self, kept: Tensor) -> bool:
        """Do components lose less on other rows than as many channels (k,), from which the others are regressed?

        False where the channels lose nothing, as each of the others is a multiple of one of them.
        """
        whole = max(sum(float(cell.powers.sum()) for cell in self.cells), torch.finfo(torch.float64).tiny)
        exact, by_channels, by_components = 0.0, 0.0, 0.0
        for cell in self.cells:
            stays = torch.isin(cell.channels, kept).nonzero().flatten()
            lost = float((cell.mass * missed(cell.covariance, stays)).sum())
            count = len(stays)
            exact += float((cell.mass.diagonal() * _missed_by_one(cell.covariance, stays)).sum())
            by_channels += lost * elsewhere(count, self.independent)
            by_components += float(self.curve(cell.cell)[count]) if cell.strand == 0 else 0.0
        return exact > EXACT * whole and by_components < by_channels


def _freedom(k: int, n: int) -> float:
    """The degrees of freedom for each channel of a fit of rank k to n channels, which has 2 n k - k^2 parameters."""
    return 2 * k - k * k / n


def missed(covariance: Tensor, kept: Tensor) -> Tensor:
    """The second moments (n, n) of what a regression on the kept channels (k,) leaves of all of them."""
    across = covariance[kept]
    left = covariance - across.T @ solve_ridge(across[:, kept], across, RIDGE) if len(kept) else covariance
    return (left + left.T) / 2


def _missed_by_one(covariance: Tensor, kept: Tensor) -> Tensor:
    """What the best multiple of one kept channel leaves of the power of each channel, (n,)."""
    power = covariance.diagonal()
    solid = power[kept] > power.max().clamp(min=0) * NULL
    removed = torch.where(solid, covariance[:, kept].square() / torch.where(solid, power[kept], 1), 0)
    return (power - removed.amax(1)).clamp(min=0) if len(kept) else power


def components(
    covariance: Tensor, mass: Tensor, cells: Tensor, independent: float, centred: bool = False
) -> Components:
    """The components of a group of n channels.

    covariance, mass: C and M of each strand, (strands, n, n)
    cells:            (n,) the cell of each channel
    independent:      rows that C is known from
    centred:          does a LayerNorm read them? See `centred_rotation`.
    """
    found = []
    for strand in range(len(covariance)):
        for number in range(int(cells.max()) + 1):
            inside = (cells == number).nonzero().flatten()
            own, read = (square[strand][inside][:, inside] for square in (covariance, mass))
            turn = centred_rotation if centred else rotation
            found.append(Cell(number, strand, inside, *turn(own, read), own, read))
    return Components(tuple(found), independent)


def rotation(covariance: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """B (n, n) and the powers s_i^2 (n,) of its rows, for C (n, n) and M (n, n), positive semidefinite."""
    n = len(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    solid = values > values[-1].clamp(min=0) * NULL
    basis, scale = vectors[:, solid], values[solid].sqrt()  # (n, r), (r,)
    if not len(scale):
        return torch.eye(n, dtype=covariance.dtype), covariance.new_zeros(n)
    root = _root(basis.T @ mass @ basis)  # M^1/2 in the range of C
    left, singular, _ = torch.linalg.svd(root * scale)
    read = singular > singular[0] * NULL**0.5
    inner = torch.linalg.qr((root @ left)[:, read], mode="complete")[0] if bool(read.any()) else torch.eye(len(scale))
    rows = torch.cat([basis @ inner.to(basis), vectors[:, ~solid]], 1).T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    powers = torch.zeros(n, dtype=covariance.dtype)
    powers[: len(singular)] = singular.square()
    return rows * torch.where(largest < 0, -1.0, 1.0), powers


def centred_rotation(covariance: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """B (n, n) with B 1 = 1, so that it passes the centring of a LayerNorm, and the powers that each place adds (n,).

    The components are among the vectors that sum to zero. Those to be kept must do so within the places that are kept:
    in the Helmert basis, the first k - 1 vectors span all vectors over k places that sum to zero, and the others are
    constant there, which a LayerNorm over the k places takes out. So k places hold k - 1 components, for each k.
    """
    basis = helmert(len(covariance)).to(covariance)
    within, powers = rotation(basis.T @ covariance @ basis, basis.T @ mass @ basis)
    ones = torch.full_like(covariance, 1 / len(covariance))
    return basis @ within @ basis.T + ones, torch.cat([powers.new_zeros(1), powers])


def helmert(n: int) -> Tensor:
    """An orthonormal basis (n, n - 1) of the vectors that sum to zero: column j is (1, ..., 1, -j, 0, ...), scaled."""
    j = torch.arange(1, n, dtype=torch.float64)
    place = torch.arange(n)[:, None]
    columns = (place < j).double() - j * (place == j)
    return columns / (j * (j + 1)).sqrt()


def _root(square: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((square + square.T) / 2)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def blended(covariance: Tensor, modelled: Tensor, share: float) -> Tensor:
    """(1 - share) of a covariance that was estimated from few rows, and `share` of one by weights, of equal trace."""
    trace = modelled.diagonal().sum()
    if share <= 0 or float(trace) <= 0:
        return covariance
    return covariance * (1 - share) + modelled * (share * covariance.diagonal().sum() / trace)
