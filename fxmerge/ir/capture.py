"""The records of capture: a traced model and what its example run showed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxmerge.ir.branches import Measured
from fxmerge.ir.mixtures import Thinned
from fxmerge.ir.provenance import Provenance

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FOLDED = "folded_from"  # in a node's meta: the paths of the tensors that its parameter was computed from
CALLER = "caller"  # in the meta of a recorded node: the path of the module whose own code makes the call
SIZE_CHECK = "size_check"  # in a node's meta: an assertion on the size of an input, which is kept although unused


@dataclass(frozen=True, kw_only=True)
class Capture:
    """A traced model: the graph module and what its example run showed."""

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Any, ...]  # the values of the graph's placeholders
    outputs: tuple[Tensor, ...]  # of the model itself, floating-point tensors only
    shapes: Mapping[str, tuple[int, ...]]  # node -> shape of the tensor that it returned
    dtypes: Mapping[str, torch.dtype]
    devices: Mapping[str, torch.device]
    recorded: Recorded | None = None  # for a model that could not be traced as a whole
    left_out: tuple[str, ...] = ()  # types of objects in the model's output that no graph can return
    model: nn.Module | None = None  # the user's own model, into whose class a saved result can be loaded
    given: nn.Module | None = None  # the same in the wrapper that it was given in, as that of torch.compile
    program: ExportedProgram | None = None  # the exported program that the model was given as
    blank: bool = False  # is the model on the meta device, so that its weights have no values?
    exported: bool = False  # was the graph made by torch.export?
    dynamic_shapes: Mapping[str, Any] | None = None  # by input, what the user declared about its sizes
    random: bool = False  # do two runs of the model on the same inputs differ, in evaluation mode?
    sharding: Sharding | None = None  # for a model that is divided among processes
    cut: Cut | None = None  # for a graph that lacks residual branches or experts of the model

    @property
    def whole(self) -> Capture:
        """The capture of the model as it was given, with all of its residual branches and experts."""
        return self if self.cut is None else self.cut.whole

    @property
    def name(self) -> str:
        """The class of the user's model. The graph of an exported program has no class; its nodes name the model's."""
        found = type(self.model or self.module).__name__
        if found == "GraphModule":
            stacks = (n.meta.get("nn_module_stack") or {} for n in self.module.graph.nodes)
            whole = [kind for stack in stacks for path, kind in stack.values() if path == ""]
            kind = whole[0] if whole else found
            found = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
        return found

    @property
    def route(self) -> str:
        """How the model was captured: "symbolic", "export" or "recorded"."""
        if self.recorded is not None:
            return "recorded"
        return "export" if self.exported else "symbolic"


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model was divided among processes.

    calls: those of fully_shard, from the inside out
    """

    calls: tuple[ShardCall, ...]


@dataclass(frozen=True, kw_only=True)
class ShardCall:
    """A call of fully_shard on the module at a path."""

    path: str
    mesh: Any
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a capture without some residual branches, or some experts, differs from that of the whole model.

    whole, facts:  the capture of the whole model, and its provenance
    dropped:       the branches that are left out
    starts:        the nodes that read other values than they do in the whole model
    left:          {kind of budget: the share of the whole model's cost that the graph has}
    thinned:       the mixtures of experts of which some are left out
    target:        the graph that refit compares with, if it is not that of the whole model
    """

    whole: Capture
    facts: Provenance
    dropped: tuple[Measured, ...]
    starts: frozenset[str]
    left: Mapping[str, float]
    thinned: tuple[Thinned, ...] = ()
    target: fx.GraphModule | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A submodule whose graph is part of a recorded graph, from its first call.

    entered:  for each placeholder, (the recorded graph's node, the placeholder's name, its default as a tuple)
    nodes:    the nodes of the first call, in order
    result:   what the part returns, a tree of nodes of the recorded graph
    again:    the nodes of each further call, in the same order
    """

    path: str
    class_name: str
    entered: tuple[tuple[str, str, Any], ...]
    nodes: tuple[str, ...]
    result: Any
    again: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The graph of one run of a model that cannot be traced as a whole (see `capture/record.py`).

    host:   a copy of the model, in the user's own class, that shares the model's tensors
    glue:   nodes outside the parts, which are the user's own code and cannot be edited
    held:   nodes whose channels must stay, and why
    again:  records a run of the host on other arguments
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    host: nn.Module
    parts: tuple[Part, ...]
    glue: frozenset[str]
    held: Mapping[str, str]
    again: Callable[[tuple[Any, ...], dict[str, Any]], Recorded]
