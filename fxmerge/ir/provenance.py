"""The records of provenance: which channel of which parameter goes where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from fxmerge.ir.layer_ops import LayerOp

Kind = Literal[
    "query",
    "movement",
    "per_channel",
    "producer",
    "per_channel_param",
    "tie",
    "mixer",
    "contraction",
    "unknown",
    "output",
    "input",
]


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
class Turned:
    """A stack of matrices, (n, a, b), as an operand, each of them transposed. Its elements have no labels yet."""

    param: Param


@dataclass(frozen=True)
class ParamLabels:
    """The labels of one parameter: the only index map that `rewrite` slices by.

    axes:      axis -> labels along it; with groups > 1, axis 1 has (groups * in/groups,) labels, one row for each
               group; (experts, size) along an axis of stacked matrices that each have labels of their own
    elements:  or, for a raw parameter, a label for each element
    """

    path: str
    axes: Mapping[int, Tensor] = field(default_factory=dict)
    elements: Tensor | None = None
    groups: int = 1


@dataclass(frozen=True)
class Layer:
    """One use of an op that owns parameters.

    reads:    labels of the input channels of a consumer, (groups, in/groups), or None
    writes:   labels of the output channels of a producer, (out,), or None
    carries:  labels of per-channel parameters, (C,) or shaped like a raw parameter, or None
    bare:     has it no bias, and must it get none?
    reads_apart, writes_apart:  has each of stacked experts labels of its own? Then there are those of all of them, one
              expert after another: reads (1, experts * in), writes (experts * out,)
    inner:    does it read what its own node computes, as W_hh of a recurrent layer does?
    """

    node: str
    module: str  # its name for users: the module's path, or the parameter's for a functional call
    operation: LayerOp
    params: Mapping[str, str]  # slot ("weight", "bias", "running_var", ...) -> parameter path
    reads: Tensor | None = None
    writes: Tensor | None = None
    carries: Tensor | None = None
    groups: int = 1
    transposed: bool = False
    eps: float = 0.0
    batch_statistics: bool = False  # does a norm use its input's own mean and variance, whatever it has stored?
    inner: bool = False
    bare: bool = False
    reads_apart: bool = False
    writes_apart: bool = False

    @property
    def op(self) -> str:
        """The name of its op, "linear" or "scale"."""
        return self.operation.name

    @property
    def is_stacked(self) -> bool:
        """Is its weight a stack of matrices: (experts, in, out) if transposed, else (experts, out, in)?"""
        return self.op == "experts"

    @property
    def takes_constants(self) -> bool:
        """Can a constant be added to its outputs, by its bias or after it? Not to each expert's, nor inside an RNN."""
        inside = self.op == "projection" or (self.operation.is_recurrent and "bias" not in self.params)
        return not self.is_stacked and not inside and not self.bare

    @property
    def has_running_statistics(self) -> bool:
        """Does a norm subtract a stored mean and divide by a stored deviation, rather than those of its input?"""
        return not self.batch_statistics and "running_mean" in self.params and "running_var" in self.params


@dataclass(frozen=True)
class Tie:
    """Labels that one node ties, position by position, (m,) and (m,): dropped together or not at all."""

    node: str
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Pin:
    """Labels that must stay, and why."""

    labels: Tensor
    reason: str
    node: str
    where: str  # the user's source line, or ""


@dataclass(frozen=True)
class Block:
    """Rows of labels, (blocks, size). All rows must lose equally many.

    outer:  the sizes of the axes that number the rows, where the op laid its channels out along several axes; what is
            left of each row is then packed along the last axis of these channels
    leaves_whole: may a row leave as a whole (a head of attention), where whole blocks may leave?
    """

    labels: Tensor
    node: str
    where: str = ""  # the user's source line
    outer: tuple[int, ...] = ()
    leaves_whole: bool = True


@dataclass(frozen=True)
class Stack:
    """The channels of an axis of a parameter that holds one matrix, or one row of values, for each of several experts.

    An activation has one label for a channel of all experts; which expert computed a place is decided by its values.

    path:    the parameter's, whose first axis numbers the experts
    labels:  (n,) those of the activations
    rows:    (experts, n) the elements of a raw parameter, the first row of which is `labels`; None for a weight
    axis:    of a weight's channels
    key:     the node that tells which expert computed a place; equal where two layers use the same experts at each
    """

    node: str
    path: str
    labels: Tensor
    experts: int
    key: str
    rows: Tensor | None = None
    axis: int = 0


@dataclass(frozen=True)
class Grid:
    """Labels along several axes, at an op for which the places along some of them matter.

    labels:  with the axes only that they vary along
    held:    the axes along which no channel may come to another place, as the heads of attention; if none, channels
             may move along one axis only, since two operands that are laid out in the same way meet
    single:  is there one value of something else for each place along `held`? Then all places lose equally many.
    """

    labels: Tensor
    node: str
    where: str
    held: tuple[int, ...] = ()
    single: bool = False


@dataclass(frozen=True)
class Bond:
    """Rows of labels, (blocks, size), each of which is dropped as a whole or stays, where whole blocks may leave.

    held:        labels that must stay if rows leave whole
    ties, pins:  what holds instead if rows do not leave whole but may lose width
    """

    rows: Tensor
    node: str
    held: tuple[Pin, ...] = ()
    ties: tuple[Tie, ...] = ()
    pins: tuple[Pin, ...] = ()


@dataclass(frozen=True)
class Untouched:
    """Parameters of a module by which no layer of the graph reads, writes or carries channels, and why."""

    module: str
    channels: int  # along the first axis
    reason: str
    where: str


@dataclass(frozen=True)
class Contraction:
    """One sum of products of two activations: their label tensors, and a letter for each axis as in einsum.

    out: the letters of the result's axes
    """

    node: str
    left: Tensor
    right: Tensor
    letters: tuple[str, str]
    out: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which channel goes where: the facts found by one run of the graph on labels."""

    labels: Mapping[str, Tensor]  # node -> label tensor
    values: Mapping[str, Any]  # node -> its value, where that is not a tensor that depends on the input
    kinds: Mapping[str, Kind]  # node -> the kind of its rule
    sources: Mapping[str, tuple[str, ...]]  # node -> the nodes whose values it reads, after updates in place
    commutes: Mapping[str, bool]  # node -> does a positive factor pass through it unchanged?
    linear: Mapping[str, bool]  # node -> is it linear, in the same way for each channel (`Rule.linear`)?
    rules: Mapping[str, str]  # node -> the name of its rule, for calls that have one
    same_call: Mapping[str, str]  # node -> the first node that calls the same op with the same parameters and constants
    layers: tuple[Layer, ...]
    params: Mapping[str, ParamLabels]
    ties: tuple[Tie, ...]
    pins: tuple[Pin, ...]
    blocks: tuple[Block, ...]
    mixers: tuple[tuple[str, Tensor], ...]  # (node, labels that it couples, as a LayerNorm does)
    label_count: int
    made: Mapping[str, bool] = field(default_factory=dict)  # node that makes a constant as wide as others -> not zero?
    views: frozenset[str] = frozenset()  # nodes that are views of raw parameters, not activations
    contractions: tuple[Contraction, ...] = ()
    grids: tuple[Grid, ...] = ()
    stacks: tuple[Stack, ...] = ()
    bonds: tuple[Bond, ...] = ()  # empty unless whole blocks may leave
    whole: Tensor | None = None  # labels of the blocks that leave whole
    untouched: tuple[Untouched, ...] = ()


def blocks_left(layer: Layer, alive: Tensor) -> int:
    """The number of a layer's groups that hold a label with `alive[label]` True."""
    labels = layer.carries if layer.reads is None else layer.reads
    if layer.groups == 1 or labels is None:
        return layer.groups
    return int(alive[labels.reshape(layer.groups, -1)].any(1).sum())


def batch_norms(facts: Provenance) -> dict[str, Layer]:
    """The BatchNorm layers of a graph, by node."""
    return {layer.node: layer for layer in facts.layers if layer.op == "batch_norm"}


def can_shift(layer: Layer) -> bool:
    """May the layer have a bias? A matrix product has no place for one, and the user may want no new ones."""
    return "bias" in layer.params or not (layer.op in ("matrix", "experts") or layer.bare)


def without_new_biases(facts: Provenance) -> Provenance:
    """The same facts, with layers that have no bias marked, so that they get none."""
    return replace(facts, layers=tuple(replace(la, bare="bias" not in la.params) for la in facts.layers))
