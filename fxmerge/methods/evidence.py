"""The frozen records that the maths works on: what selectors choose from, and what decompositions know of a group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """How one layer reads a group: gram (p, p) of its patches about their mean, weight (o, p), columns of channels."""

    gram: Tensor
    weight: Tensor
    channels: Tensor  # (m,) which of the group's channels it reads
    columns: Tensor  # (m, q) where they stand in a patch


@dataclass(frozen=True)
class Candidates:
    """The channels that a selector chooses from: all n of a group, or those that `index` names.

    parts:    (n, d_i) each: what the group's producers compute a channel with, one after another; a bias is one column
    filters:  (n, in, k) the first producer's kernels by input channel
    readings: how each consumer sees the whole group, where probes were run

    `rows` and `kernels` are put together when they are asked for: the weights of a classifier take long to copy.
    """

    parts: tuple[Tensor, ...]
    filters: Tensor
    seed: int = 0
    readings: tuple[Reading, ...] = ()
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.filters) if self.index is None else len(self.index)

    @cached_property
    def rows(self) -> Tensor:
        """(n, d) all parts side by side."""
        parts = [self._those(part) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @cached_property
    def kernels(self) -> Tensor:
        """(n, in, k) the first producer's kernels by input channel."""
        return self._those(self.filters)

    @cached_property
    def norms(self) -> Tensor:
        """(n,) Euclidean norms of the rows."""
        norms: list[Tensor] = [torch.linalg.vector_norm(self._those(part), 2, dim=1) for part in self.parts]
        return reduce(torch.hypot, norms)

    def only(self, index: Tensor) -> Candidates:
        """Some of a whole group's channels."""
        return self if len(index) == len(self) else replace(self, index=index)

    def _those(self, values: Tensor) -> Tensor:
        return values if self.index is None else values[self.index]


@dataclass(frozen=True)
class Pairs:
    """The inner products that looking for a partner takes: a quarter of all."""

    across: Tensor  # (m, k) of the rows that go with those that stay, both ascending
    square: Tensor  # (n,) of every row with itself

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self.across + other.across, self.square + other.square)

    def __mul__(self, other: Pairs) -> Pairs:
        return Pairs(self.across * other.across, self.square * other.square)


@dataclass(frozen=True)
class PublishedForm:
    """One producer and its BatchNorm as the published code reads them: `Evidence.inner` is of the raw rows."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Evidence:
    """What a decomposition knows of a group's n channels, float64.

    inner:      (n, n) inner products of the rows, the raw ones in the published form; pairs, where they will do
    bias:       (n,) the constants, in the same coordinates
    centred:    has the group a BatchNorm? then constants count apart from the rows (without one they are a column)
    cells:      (n,) partners are looked for within a cell
    scalable:   may a partner be scaled? (False behind GELU and its like)
    published:  the published code's operands, where it has this form
    """

    inner: Tensor | Pairs
    bias: Tensor
    centred: bool
    cells: Tensor
    scalable: bool
    threshold: float
    lam: float
    published: PublishedForm | None = None
