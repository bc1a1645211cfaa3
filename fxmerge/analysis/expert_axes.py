"""Which axes of a router's values have an entry for each expert, and which values are numbers of experts.

The values are followed from the scores of a router on. An axis of a value has one of these roles:

    ""   nothing that follows the number of experts
    "E"  the experts
    "G"  groups of experts, as many as before
    "P"  the experts of one group
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxmerge.graph.ops import plain_name
from fxmerge.ir.capture import Capture
from fxmerge.ir.mixtures import Size, Sized
from fxmerge.ir.provenance import Provenance
from fxmerge.rules.call_names import call_name

Place = tuple[int | str, ...]


@dataclass(frozen=True)
class Held:
    """A tensor of which some axis has an entry for each expert, or for each group of them."""

    roles: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """A tensor of numbers: of experts, or of experts within their group, which no op may read."""

    within: bool = False


@dataclass(frozen=True)
class Refused:
    """Why an op cannot be followed."""

    reason: str


Value = Held | Numbers | None  # None: nothing in it follows the number of experts
Followed = Value | Refused | tuple[Value, ...]


@dataclass
class ExpertAxes:
    """What is known of the values of one mixture, as far as its nodes have been followed.

    experts:  how many there are
    stacks:   the parameters that hold one matrix, or one row, for each of them
    tensors, sizes, choices: as those of the mixture
    chosen:   role -> how many are chosen along such an axis: the most; of groups, the fewest
    """

    captured: Capture
    facts: Provenance
    experts: int
    stacks: frozenset[str]
    groups: int = 1
    tensors: dict[str, int] = field(default_factory=dict)
    sizes: list[Sized] = field(default_factory=list)
    values: dict[str, Value | tuple[Value, ...]] = field(default_factory=dict)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    chosen: dict[str, int] = field(default_factory=dict)

    def least(self) -> int:
        """The smallest number of experts in a group of which the router can choose as many as before."""
        return max(self.chosen.get("P", 1), -(-self.chosen.get("E", 1) // self.chosen.get("G", self.groups)))

    def shape(self, operand: Any) -> tuple[int, ...]:
        return self.captured.shapes.get(operand.name, ()) if isinstance(operand, fx.Node) else ()

    def sized(self, node: fx.Node, place: Place, size: Size) -> None:
        """Notes a literal that follows the number of experts."""
        self.sizes.append(Sized(node.name, place, size))


class Call:
    """The arguments of a call, however it is spelled."""

    def __init__(self, node: fx.Node, values: Mapping[str, Value | tuple[Value, ...]]) -> None:
        self.node, self.values = node, values
        self.first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
        self.others = [n for n in node.all_input_nodes if n is not self.first]
        last = node.args[-1] if node.args else None
        self.last_name = last if isinstance(last, str) else plain_name(node)

    def value(self, operand: Any) -> Value:
        found = self.values.get(operand.name) if isinstance(operand, fx.Node) else None
        return None if isinstance(found, tuple) else found

    def place(self, name: str, position: int) -> Place:
        """Where an argument is: its position, or its name where it is given by name."""
        return (position,) if len(self.node.args) > position else (name,)

    def named(self, name: str, position: int, default: Any = None) -> Any:
        return self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(name, default)

    def axes(self, rank: int) -> list[int] | None:
        """The axes that a reduction runs over; None if they are not known."""
        given = self.named("dim", 1)
        dims = [given] if isinstance(given, int) else given
        if not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
            return None
        return [d % rank for d in dims]

    def lengths(self) -> list[tuple[Place, Any]]:
        """(place, size) of the sizes in a call such as view: one list of them, or one argument each."""
        if len(self.node.args) > 1 and isinstance(self.node.args[1], (list, tuple)):
            return [((1, i), size) for i, size in enumerate(self.node.args[1])]
        if len(self.node.args) == 1:
            name = next((n for n in ("size", "shape") if isinstance(self.node.kwargs.get(n), (list, tuple))), "")
            given: Any = self.node.kwargs.get(name, ())
            return [((name, i), size) for i, size in enumerate(given)]
        return [((i,), size) for i, size in enumerate(self.node.args[1:], 1)]


Rule = Callable[[ExpertAxes, fx.Node, Call], Followed]


def unknown(node: fx.Node) -> Refused:
    """The refusal of an op of which it is not known what it does."""
    return Refused(f"{call_name(node)} reads what follows the number of experts")
