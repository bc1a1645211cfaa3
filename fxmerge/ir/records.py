"""The frozen records that stages hand to each other, and nothing else.

Vocabulary: a *label* is the number of one channel of one parameter; labels that must live or die together form an
*atom*; a *group* is a set of atoms that are compared with, and merged into, each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxmerge.ir.recorded import Recorded

Kind = Literal[
    "query", "movement", "per_channel", "writer", "carrier", "tie", "mixer", "contraction", "unknown", "output", "input"
]
DEPTHWISE = ("depthwise", "depthwise_transpose")  # ops of layers with a filter for each channel
FOLDED = "folded_from"  # in a node's meta: the paths of the tensors that its parameter was computed from


@dataclass(frozen=True)
class Aten:
    """An aten op, by its plain name, that no function or method of torch has the name of."""

    name: str


@dataclass(frozen=True)
class Param:
    """A parameter or buffer as an operand: its path in the graph module, and its value."""

    path: str
    value: Tensor


@dataclass(frozen=True)
class Lab:
    """An activation as an operand: its label tensor (of the activation's shape)."""

    t: Tensor


@dataclass(frozen=True)
class View(Lab):
    """A raw parameter as an operand, moved about but otherwise as it is: the labels of its elements."""

    param: Param


@dataclass(frozen=True)
class ParamLabels:
    """Which label stands where in one parameter; the only index map that `rewrite` slices by.

    axes:      axis -> labels along it; with groups > 1 axis 1 holds (groups, in/groups) labels, one row a group
    elements:  or, for a raw parameter, a label for each element
    """

    path: str
    axes: Mapping[int, Tensor] = field(default_factory=dict)
    elements: Tensor | None = None
    groups: int = 1


@dataclass(frozen=True)
class Layer:
    """One use of an op that owns parameters.

    reads:    labels of the input channels, (groups, in/groups), or None
    writes:   labels of the output channels, (out,), or None
    carries:  labels of the per-channel parameters of a carrier, shaped like the parameter, or None
    """

    node: str
    module: str  # what users call it: the module's path, or the parameter's for functional spellings
    op: str
    params: Mapping[str, str]  # slot ("weight", "bias", "running_var", ...) -> parameter path
    reads: Tensor | None = None
    writes: Tensor | None = None
    carries: Tensor | None = None
    groups: int = 1
    transposed: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class Tie:
    """Labels that one node makes equal, position by position: (m,) and (m,)."""

    node: str
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Pin:
    """Labels that may not be dropped, and why."""

    labels: Tensor
    reason: str
    node: str
    where: str  # the user's source line, or ""


@dataclass(frozen=True)
class Block:
    """Rows of labels, (blocks, size), each of which must lose equally many."""

    labels: Tensor
    node: str


@dataclass(frozen=True)
class Bond:
    """Rows of labels, (blocks, size), each of which leaves whole or stays whole, where whole blocks may leave.

    held:  what must stay where rows leave whole
    ties, pins:  what holds instead where they do not leave whole, and may leave narrower
    """

    rows: Tensor
    node: str
    held: tuple[Pin, ...] = ()
    ties: tuple[Tie, ...] = ()
    pins: tuple[Pin, ...] = ()


@dataclass(frozen=True)
class Untouched:
    """A module's parameters that no layer of the graph reads or writes channels with, and why."""

    module: str
    channels: int  # along the first axis
    reason: str
    where: str


@dataclass(frozen=True)
class Contraction:
    """One sum of products of two activations, their axes named as in einsum: label tensors and letters."""

    node: str
    left: Tensor
    right: Tensor
    letters: tuple[str, str]


@dataclass(frozen=True)
class Provenance:
    """Which channel went where: what one run of the graph on labels found."""

    labels: Mapping[str, Tensor]  # node -> label tensor
    values: Mapping[str, Any]  # node -> what it evaluated to, where it is no tensor that depends on the input
    kinds: Mapping[str, Kind]  # node -> what its rule is
    sources: Mapping[str, tuple[str, ...]]  # node -> the nodes whose values it reads, in-place updates seen
    commutes: Mapping[str, bool]  # node -> does a positive factor pass through it unchanged?
    layers: tuple[Layer, ...]
    params: Mapping[str, ParamLabels]
    ties: tuple[Tie, ...]
    pins: tuple[Pin, ...]
    blocks: tuple[Block, ...]
    mixers: tuple[tuple[str, Tensor], ...]  # (node, labels it couples inexactly)
    label_count: int
    views: frozenset[str] = frozenset()  # nodes that are views of raw parameters, not activations
    contractions: tuple[Contraction, ...] = ()
    bonds: tuple[Bond, ...] = ()  # found only where it was asked for whole blocks
    whole: Tensor | None = None  # labels of the blocks that leave whole
    untouched: tuple[Untouched, ...] = ()


@dataclass(frozen=True)
class Member:
    """A layer's part in a group: which of its channels are the group's.

    channels:  (m,) which of the group's n channels stand in this layer, ascending
    where:  (m, copies) their places along the layer's axis; several where one channel stands several times, as after
            a flatten. For a grouped reader a place counts through all of its groups.
    steps:  writer: what its output passes on the way to the group's common coordinates;
            reader: what the group passes from there to this reader
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
class Group:
    """Channels that are compared with, and merged into, each other: n of them."""

    name: str
    atoms: Tensor  # (n,) the atom that each channel is
    cells: Tensor  # (n,) channels merge within their cell only
    writers: tuple[Member, ...]
    carriers: tuple[Member, ...]
    readers: tuple[Member, ...]
    mixers: tuple[str, ...]
    ties: tuple[str, ...]  # the nodes that tie several writers
    internal: bool  # one writer, its readers on one path
    scale_blocks: tuple[str, ...]  # nodes that a scale other than 1 does not commute with
    blocks: tuple[tuple[tuple[int, ...], ...], ...] = ()  # blocks of rows of cells; a block's rows keep equally many
    partners: bool = True  # False: copies do not line up, so channels can be dropped but not merged

    @property
    def channels(self) -> int:
        return len(self.atoms)


@dataclass(frozen=True)
class Refusal:
    """Channels that stay as they are: a value with a reason, not an exception."""

    name: str  # the layer that writes them
    channels: int
    reason: str
    where: str


@dataclass(frozen=True)
class Capture:
    """A traced model: the graph module and what its example run showed."""

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Any, ...]  # the values of the graph's placeholders
    outputs: tuple[Tensor, ...]  # what the model itself gave, floating-point tensors only
    shapes: Mapping[str, tuple[int, ...]]  # node -> shape of the tensor that it gave
    dtypes: Mapping[str, torch.dtype]
    devices: Mapping[str, torch.device]
    recorded: Recorded | None = None  # for a model that could not be traced whole
    left_out: tuple[str, ...] = ()  # types of objects in the model's output that no graph can return
    model: nn.Module | None = None  # the user's own, whose class a saved result may be loaded into
    program: ExportedProgram | None = None  # what the model came as, where it came so
    blank: bool = False  # has it shapes, but no values of its weights (a model on the meta device)?

    @property
    def route(self) -> str:
        """How the model was captured: "symbolic", "export" or "recorded"."""
        if self.recorded is not None:
            return "recorded"
        return "export" if isinstance(self.module.graph._codegen, fx.graph._PyTreeCodeGen) else "symbolic"


@dataclass(frozen=True)
class Decomposition:
    """x ~ up @ x_kept + shift for one reader of a group: up (n, k), shift (n,), float64."""

    up: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Merge:
    """One group's part of a rewrite; without `down` and `readers` the channels that are not kept just go.

    down:     (k, n) how its writers are mixed, None where they are only selected
    readers:  what each reader absorbs
    gains:    for each writer, (n,) gain on rows, (n,) gain on constants, (n,) constant in the common coordinates
    """

    group: Group
    kept: Tensor
    down: Tensor | None = None
    readers: tuple[Decomposition, ...] = ()
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
