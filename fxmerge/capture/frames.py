"""One frame of a recorded run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx


@dataclass
class Frame:
    """The running forward of one module, and the nodes of the tensors that its own code sees."""

    path: str
    seen: set[fx.Node] = field(default_factory=set)
