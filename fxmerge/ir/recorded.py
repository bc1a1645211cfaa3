"""The records of a model that cannot be traced whole: its recorded graph, and the parts of it that can be rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn


@dataclass(frozen=True)
class Part:
    """A submodule whose graph stands in a recorded graph, as its first call put it there.

    entered:  for each placeholder: (the recorded graph's node, the placeholder's name, its default as a tuple)
    nodes:    the nodes of this call, in order
    result:   what the part returns, a tree of nodes of the recorded graph
    again:    the nodes of further calls, in the same order
    """

    path: str
    class_name: str
    entered: tuple[tuple[str, str, Any], ...]
    nodes: tuple[str, ...]
    result: Any
    again: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Recorded:
    """The graph of one run of a model that cannot be traced whole (see `recording.py`).

    host:   a copy of the model, in the user's own class, that shares the model's tensors
    glue:   the nodes outside of parts, the user's own code: they cannot be edited
    held:   nodes whose channels must stay, and why
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    host: nn.Module
    parts: tuple[Part, ...]
    glue: frozenset[str]
    held: Mapping[str, str]
