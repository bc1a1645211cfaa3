"""The records of grouping: merge groups, their members, and what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.ir.provenance import Layer


@dataclass(frozen=True)
class Member:
    """A layer's part in a group: which of its channels are the group's.

    channels:  (m,) which of the group's n channels stand in this layer, ascending
    where:  (m, copies) their places along the layer's axis; several where one channel stands several times, as after
            a flatten. For a grouped consumer a place counts through all of its groups.
    steps:  producer: what its output passes on the way to the group's common coordinates;
            consumer: what the group passes from there to this consumer
    """

    layer: Layer
    role: Literal["write", "read", "carry"]
    channels: Tensor
    where: Tensor
    steps: tuple[str, ...] = ()

    def local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(which entries of `index` stand in this layer, bool; the rows of `where` that those are)."""
        at = torch.searchsorted(self.channels, index.contiguous()).clamp(max=len(self.channels) - 1)
        here = self.channels[at] == index
        return here, at[here]


@dataclass(frozen=True)
class Meeting:
    """How the outputs of some producers make up a channel, where they meet.

    op:        "add", "sub" or "mul", "either" (concatenated, or never in one tensor), or "halves": two copies of a
               channel in one producer are multiplied, as in a gated linear unit
    operands:  the numbers of producers (0 to p - 1 of a group's p producers) and of earlier meetings (p, p + 1, ...)
    """

    op: Literal["add", "sub", "mul", "either", "halves"]
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that are compared with, and merged into, each other: n of them."""

    name: str
    atoms: Tensor  # (n,) the atom that each channel is
    cells: Tensor  # (n,) channels merge within their cell only
    producers: tuple[Member, ...]
    per_channel_params: tuple[Member, ...]
    consumers: tuple[Member, ...]
    mixers: tuple[str, ...]
    ties: tuple[str, ...]  # the nodes that tie several producers
    internal: bool  # one producer, its consumers on one path
    scale_blocks: tuple[str, ...]  # nodes that a scale other than 1 does not commute with
    blocks: tuple[tuple[tuple[int, ...], ...], ...] = ()  # blocks of rows of cells; a block's rows keep equally many
    partners: bool = True  # False: copies do not line up, so channels can be dropped but not merged
    meetings: tuple[Meeting, ...] = ()  # how several producers meet; the last one is the group's channels

    @property
    def channels(self) -> int:
        return len(self.atoms)

    @property
    def params_at(self) -> dict[str, list[Member]]:
        """The per-channel parameters by node. A node has several members where channels stand in it different times."""
        found: dict[str, list[Member]] = {}
        for member in self.per_channel_params:
            found.setdefault(member.layer.node, []).append(member)
        return found


@dataclass(frozen=True)
class Refusal:
    """Channels that stay as they are: a value with a reason, not an exception."""

    name: str  # the layer that writes them
    channels: int
    reason: str
    where: str


@dataclass(frozen=True)
class Decomposition:
    """x ~ up @ x_kept + shift for one consumer of a group: up (n, k), shift (n,), float64."""

    up: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Merge:
    """One group's part of a rewrite; without `down` and `consumers` the channels that are not kept just go.

    down:     (k, n) how its producers are mixed, None where they are only selected
    consumers:  what each consumer absorbs
    gains:    for each producer, (n,) gain on rows, (n,) gain on constants, (n,) constant in the common coordinates
    """

    group: Group
    kept: Tensor
    down: Tensor | None = None
    consumers: tuple[Decomposition, ...] = ()
    gains: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class Grouping:
    """What may be merged with what, what may not, and the networkx graph that says so (see `groups`)."""

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    atom: Tensor  # (label_count,) the atom of each label
    graph: Any  # networkx.DiGraph
    wholes: Grouping | None = None  # heads="both": the blocks that may leave whole besides; its atoms are its own

    @property
    def parts(self) -> tuple[Grouping, ...]:
        """This grouping and the one of the blocks that may leave whole, each with its own atoms."""
        return (self,) if self.wholes is None else (self, self.wholes)

    @property
    def everything(self) -> tuple[Group, ...]:
        """The groups of all parts; their names are unique."""
        return tuple(g for part in self.parts for g in part.groups)


Ints = NDArray[np.int64]


def survivors(grouping: Grouping, kept: Sequence[tuple[Group, Tensor]]) -> Tensor:
    """alive (label_count,): does the label's channel stay, and so the block that it is in?"""
    alive = torch.ones(len(grouping.atom), dtype=torch.bool)
    for part in grouping.parts:
        mine = {g.name for g in part.groups}
        stays = torch.ones(int(part.atom.max()) + 1, dtype=torch.bool)
        for group, index in kept:
            if group.name in mine:
                stays[group.atoms] = False
                stays[group.atoms[index]] = True
        alive &= stays[part.atom]
    return alive


def group_of_label(part: Grouping) -> Ints:
    """(label_count,) the number of the group that each label is in, by the order of `part.groups`; -1 for none."""
    of_atom = np.full(int(part.atom.max()) + 1, -1, dtype=np.int64)
    for number, group in enumerate(part.groups):
        of_atom[group.atoms.numpy()] = number
    found: Ints = of_atom[part.atom.numpy()]
    return found
