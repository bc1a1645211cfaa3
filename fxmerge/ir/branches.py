"""The records of residual branches: what an add `x + f(x)` computes of x, and what a model is without it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A residual branch: the part f of an add `x + f(x)`.

    name:    that of its layers, such as `layers.3.mlp` or `layer1.2`
    add:     the node of the add
    end:     the operand of the add that the branch computes
    nodes:   the nodes that nothing reads without the branch, in execution order
    layers:  the layers among them, as users name them
    """

    name: str
    add: str
    end: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]

    def overlaps(self, other: Branch) -> bool:
        """Whether not both can be dropped: they are operands of one add, or one is inside the other."""
        return not {self.add, *self.nodes}.isdisjoint((other.add, *other.nodes))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A residual branch, what it costs, and what the model loses without it.

    level:       (channels,) the mean of its outputs, which takes its place, shaped to broadcast along the channels;
                 None where it is 0, or where the channels lie along no single axis
    loss:        the relative square error of the model's outputs if this branch alone is dropped
    parameters:  elements of the parameters that nothing else uses
    flops:       of one run on the example inputs
    """

    branch: Branch
    level: Tensor | None
    loss: float
    parameters: int
    flops: int

    @property
    def name(self) -> str:
        return self.branch.name
