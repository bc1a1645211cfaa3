"""The records that selectors, decompositions and eliminations are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxmerge.methods.linalg import Pairs, coordinates, gram

if TYPE_CHECKING:
    from fxmerge.methods.elimination import Orders


@dataclass(frozen=True)
class Reading:
    """How one layer reads the channels of a group, or how scores sum them."""

    gram: Tensor  # (p, p) second moments of the layer's patches about their mean
    weight: Tensor  # (o, p)
    channels: Tensor  # (m,) the group's channels that it reads
    columns: Tensor  # (m, q) the columns of each of them in a patch
    mean: Tensor | None = None  # (p,) of the patches; None if it is not known
    consumer: int = 0  # its number among the group's consumers
    independent: float = math.inf  # rows that would determine the moments as well, if they were independent
    solved: bool = True  # whether the layer is solved again for the channels that stay; scores are not


@dataclass(frozen=True)
class Term:
    """A sum or a product of some parts and earlier terms, which are numbered after the parts."""

    product: bool
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Candidates:
    """The channels that a selector chooses from: all n of a group, or those with the indices `index`.

    parts:    for each producer, (n, d_i): the weights that it computes a channel with; a bias is one more column
    filters:  (n, in, k) the first producer's kernels by input channel
    seed:     of random selections
    readings: how each consumer reads the whole group, where refit has data
    terms:    how the parts make up a channel, where some are multiplied (gates): the last one is the channel. Without
              terms, a channel is the sum of all parts. The row of a product is the outer product of the factors' rows,
              so that its norm is the product of their norms
    orders:   the orders of elimination that are known

    `rows` and `kernels` are computed on first use, as the weights of a large classifier are slow to copy.
    """

    parts: tuple[Tensor, ...]
    filters: Tensor
    seed: int = 0
    readings: tuple[Reading, ...] = ()
    index: Tensor | None = None
    terms: tuple[Term, ...] = ()
    orders: Orders | None = None

    def __len__(self) -> int:
        return len(self.filters) if self.index is None else len(self.index)

    @property
    def taken(self) -> list[Tensor]:
        """The parts of the candidates, (n, d_i) each."""
        return [self._taken(part) for part in self.parts]

    @cached_property
    def rows(self) -> Tensor:
        """(n, d) all parts, concatenated along the columns; with terms, points that have the rows' inner products."""
        parts = self.taken
        if self.terms:
            return coordinates(self.combined([gram(part) for part in parts], torch.add))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @cached_property
    def kernels(self) -> Tensor:
        """(n, in, k) the first producer's kernels by input channel."""
        return self._taken(self.filters)

    @cached_property
    def norms(self) -> Tensor:
        """(n,) Euclidean norms of the rows."""
        norms: list[Tensor] = [torch.linalg.vector_norm(self._taken(part), 2, dim=1) for part in self.parts]
        return self.combined(norms, torch.hypot)

    def combined(self, values: list[Tensor], add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One value of the channels from those of the parts: `add` combines sums, and products are multiplied."""
        if not self.terms:
            return reduce(add, values)
        values = [value.double() for value in values]
        for term in self.terms:
            values.append(reduce(torch.mul if term.product else add, [values[o] for o in term.operands]))
        return values[-1]

    def only(self, index: Tensor) -> Candidates:
        """The channels with these indices, of candidates that are a whole group."""
        return self if len(index) == len(self) else replace(self, index=index)

    def _taken(self, values: Tensor) -> Tensor:
        return values if self.index is None else values[self.index]


@dataclass(frozen=True, kw_only=True)
class PublishedForm:
    """The BatchNorm of a group's only producer, (n,) each, for the formulas of MostSim's published code.

    With it, `Evidence.inner` is of the raw rows.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a decomposition is computed from: a group's n channels in its common coordinates, float64.

    inner:      (n, n) inner products of the rows, or `Pairs` for decompositions that need no others
    bias:       (n,) the constants
    centred:    whether the group has a BatchNorm, so that constants are kept apart; without one they are a column of
                the rows
    cells:      (n,) the cell of each channel; partners are in the same cell
    scalable:   whether a partner may be scaled; not before GELU and similar functions
    threshold:  mostsim: the smallest cosine of a channel with its partner
    lam:        mostsim: the weight of the cosine against the remaining constant
    published:  the BatchNorm for the published code's formulas, or None
    """

    inner: Tensor | Pairs
    bias: Tensor
    centred: bool
    cells: Tensor
    scalable: bool
    threshold: float
    lam: float
    published: PublishedForm | None = None
