"""The records of grouping: merge groups, their members, and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.ir.provenance import Layer


@dataclass(frozen=True)
class Member:
    """One layer of a group, and which of the layer's channels are the group's.

    role:      "write" for a producer, "read" for a consumer, "carry" for a layer with per-channel parameters
    channels:  (m,) which of the group's n channels are in this layer, ascending
    where:     (m, copies) their places along the layer's axis; several copies if the layer has a channel several times,
               as after a flatten. For a grouped consumer, places are counted through all of its groups.
    steps:     for a producer, the nodes from its output to the group's common coordinates, where the consumers' inputs
               are still the same; for a consumer, the nodes from there to its input
    """

    layer: Layer
    role: Literal["write", "read", "carry"]
    channels: Tensor
    where: Tensor
    steps: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, bytes]:
        """The weight, and where the group's channels are in it: equal for all calls of one layer."""
        return self.layer.params["weight"], self.where.numpy().tobytes()

    def local(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(which channels of `index` are in this layer, bool; their rows of `where`)."""
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
class Strands:
    """Copies of the channels that never meet on a linear path, such as heads that lose the same places.

    Each strand may be mixed by a matrix of its own. Where copies meet, or cannot be told apart, all are one strand.

    producers, consumers: for each member, the strand of each of its copies
    """

    count: int = 0
    producers: tuple[tuple[int, ...], ...] = ()
    consumers: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Path:
    """A group's layers, the nodes that hold its channels, and how they meet."""

    nodes: frozenset[str]
    producers: tuple[Member, ...]
    per_channel_params: tuple[Member, ...]
    consumers: tuple[Member, ...]
    meetings: tuple[Meeting, ...]
    mixers: tuple[str, ...]


@dataclass(frozen=True)
class Factors:
    """What else stands on a linear path: parameters of each channel that move into the layers, and norms.

    A rotation passes a LayerNorm or RMSNorm as it keeps norms; that of a LayerNorm must also keep the vector of ones.
    Their gains, and those of LayerScale, are moved into the weights of consumers and producers first.

    producers, consumers: for each of them, the parameters that are moved into it; a norm's bias stays with the norm
    added:    what is added to the channels, or joined to them as a class token is: it is rotated as a producer's rows
    normed:   for each consumer, does it read the output of a norm?
    constant: for each consumer, does a constant that the norm adds reach it as it is?
    centred:  is there a norm that subtracts the mean over channels?
    """

    producers: tuple[tuple[Member, ...], ...] = ()
    consumers: tuple[tuple[Member, ...], ...] = ()
    added: tuple[Member, ...] = ()
    normed: tuple[bool, ...] = ()
    constant: tuple[bool, ...] = ()
    centred: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """A merge group: n channels that are compared with each other and merged into each other.

    A group lists every layer that has to change when some of its channels are dropped. For example, in

        conv1 = nn.Conv2d(3, 16, 3)    # weight (16, 3, 3, 3)
        bn    = nn.BatchNorm2d(16)     # weight, bias, running_mean, running_var (16,)
        relu  = nn.ReLU()
        conv2 = nn.Conv2d(16, 8, 3)    # weight (8, 16, 3, 3)

        y = conv2(relu(bn(conv1(x))))

    conv1 creates 16 channels, labelled 1 to 16. They pass bn and relu, and conv2 sums over them, so that the labels of
    conv1's axis 0, of bn's axis 0 and of conv2's axis 1 are tied. Each label with the labels that it is tied to is one
    atom, and the 16 atoms are one group, named after its first producer:

        name                conv1
        atoms, cells        (16,), (16,)    one cell: any two of the channels may be merged
        producers           conv1           writes them along axis 0 of its weight and bias; its steps are bn, relu
        per_channel_params  bn              carries one value for each
        consumers           conv2           reads them along axis 1 of its weight
        internal            True

    Keeping 12 channels leaves conv1.weight (12, 3, 3, 3), bn (12,) and conv2.weight (8, 12, 3, 3). What the dropped
    channels contributed is added, as far as possible, to the columns of conv2.weight that stay.

    In `y = conv2(z + relu(bn(conv1(x))))`, where z is the output of another layer, the add ties the channels of conv1
    to those of that layer: both layers are producers of one group, `ties` names the add, and `internal` is False.
    """

    name: str
    atoms: Tensor  # (n,) the atom of each channel
    cells: Tensor  # (n,) the cell of each channel; channels merge only within their cell
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
    multiple: int = 1  # each cell keeps a multiple of this: torch's grouped products take rows of whole 16 bytes
    nonlinear: str = "it is not known whether its paths are linear"  # why no matrix passes from producers to consumers;
    # "" where channels of a cell may be mixed by any matrix if the consumers are multiplied by its inverse
    strands: Strands = Strands()  # of a group with linear paths
    factors: Factors = Factors()  # likewise

    @property
    def channels(self) -> int:
        return len(self.atoms)

    @property
    def writers(self) -> tuple[Member, ...]:
        """The former name of `producers`."""
        return self.producers

    @property
    def readers(self) -> tuple[Member, ...]:
        """The former name of `consumers`."""
        return self.consumers

    @property
    def params_at(self) -> dict[str, list[Member]]:
        """The per-channel parameters by node. A node has several members where channels stand in it different times."""
        found: dict[str, list[Member]] = {}
        for member in self.per_channel_params:
            found.setdefault(member.layer.node, []).append(member)
        return found


@dataclass(frozen=True)
class Refusal:
    """Channels that stay as they are, and why: a value, not an exception."""

    name: str  # the layer that produces them
    channels: int
    reason: str
    where: str


@dataclass(frozen=True)
class Decomposition:
    """x ~ up @ x_kept + shift, as one consumer of a group absorbs it: up (n, k), shift (n,), float64.

    With an `up` and a shift for each copy of the channels, up (copies, n, k) and shift (n, copies).
    """

    up: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Merge:
    """One group's part of a rewrite. Without `down` and `consumers`, channels that are not kept are only removed.

    kept:       (k,) the channels that stay
    down:       (k, n) how the producers' rows are mixed; None if rows are only selected
    consumers:  what each consumer absorbs
    gains:      for each producer, (n,) gain on rows, (n,) gain on constants, (n,) constant in the common coordinates
    norms:      {weight of a norm: what it is multiplied by}, as it is of fewer channels
    """

    group: Group
    kept: Tensor
    down: Tensor | None = None
    consumers: tuple[Decomposition, ...] = ()
    gains: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
    norms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Grouping:
    """The merge groups of a model, its refusals, and both as a networkx graph (see `analysis.groups`)."""

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    atom: Tensor  # (label_count,) the atom of each label
    graph: Any  # networkx.DiGraph
    wholes: Grouping | None = None  # heads="both": the blocks that may leave whole, with atoms of their own

    @property
    def parts(self) -> tuple[Grouping, ...]:
        """This grouping and that of the blocks that may leave whole, each with its own atoms."""
        return (self,) if self.wholes is None else (self, self.wholes)

    @property
    def everything(self) -> tuple[Group, ...]:
        """The groups of all parts; their names are unique."""
        return tuple(g for part in self.parts for g in part.groups)


Ints = NDArray[np.int64]


def survivors(grouping: Grouping, kept: Sequence[tuple[Group, Tensor]]) -> Tensor:
    """alive (label_count,): does the label's channel stay, and any block that it is in?"""
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
    """(label_count,) the index in `part.groups` of the group of each label; -1 for none."""
    of_atom = np.full(int(part.atom.max()) + 1, -1, dtype=np.int64)
    for number, group in enumerate(part.groups):
        of_atom[group.atoms.numpy()] = number
    found: Ints = of_atom[part.atom.numpy()]
    return found
