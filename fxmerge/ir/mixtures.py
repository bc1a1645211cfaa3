"""The records of mixtures of experts: what holds a row of each expert, and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Size = Literal["all", "last", "each"]


@dataclass(frozen=True)
class Sized:
    """A literal of a call that follows the number of experts.

    place: where it is in the call's arguments, from the name of an argument or its position on
    size:  what it is: the number of all experts, that of the last one, or the number of them in each group
    """

    node: str
    place: tuple[int | str, ...]
    size: Size


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A router and the experts that it chooses from, which are stacked in parameters.

    name:     of the module that holds the stacks
    layers:   the router, and the parameters that hold the stacks, as users name them
    router:   the node of the linear layer that gives each expert its score
    experts:  how many there are
    groups:   of experts, among which the router chooses first; 1 if there are none
    least:    the smallest number of experts in a group that lets the router choose as many as before
    tensors:  {parameter or buffer: the axis along which it has an entry for each expert}
    sizes:    the literals that follow the number of experts
    choices:  {node that chooses or normalises over experts: the roles of its operand's axes, as in `expert_axes`}
    nodes:    the nodes from the router to the end that depend on which experts there are, in execution order
    end:      the last of them: what the rest of the model reads
    output:   the first node after them that also reads something else, such as the add of a residual stream
    """

    name: str
    layers: tuple[str, ...]
    router: str
    experts: int
    groups: int
    least: int
    tensors: Mapping[str, int]
    sizes: tuple[Sized, ...]
    choices: Mapping[str, tuple[str, ...]]
    nodes: tuple[str, ...]
    end: str
    output: str


@dataclass(frozen=True)
class Thinned:
    """The decision for one mixture: which of its experts stay.

    loss: the relative square error, without the others, of the sum that the mixture's output is added to
    """

    name: str
    experts: int
    kept: tuple[int, ...]
    loss: float = 0.0

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(self.experts)) - set(self.kept)))
