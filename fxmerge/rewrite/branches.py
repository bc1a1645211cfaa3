"""Drops residual branches: makes the capture of the model without them, which is then merged in the model's place.

The add of a dropped branch gives its other operand plus the mean of the branch, a parameter with a value for each
channel. All other nodes keep their names, by which refit compares the graph with that of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from fxmerge.graph.cost import parameters
from fxmerge.graph.ops import updates
from fxmerge.ir.branches import Branch, Measured
from fxmerge.ir.capture import Capture, Cut
from fxmerge.ir.provenance import Provenance
from fxmerge.weights.copy import sharing_copy


def without_branches(
    captured: Capture, facts: Provenance, dropped: Sequence[Measured], flops: Mapping[str, int]
) -> Capture:
    """The capture without these branches, no two of which overlap.

    flops: of each node of the original
    """
    cut = _Cutter(captured)
    starts = {name for one in dropped for name in cut.drop(one)}
    cut.clean()
    left = {node.name for node in cut.module.graph.nodes}
    fewer, total = sum(n for name, n in flops.items() if name in left), sum(flops.values())
    shares = {
        "params": parameters(cut.module) / max(parameters(captured.module), 1),
        "flops": fewer / max(total, 1),
    }
    return replace(
        captured,
        module=cut.module,
        shapes=_of(left, captured.shapes) | {name: tuple(level.shape) for name, level in cut.levels.items()},
        dtypes=_of(left, captured.dtypes) | {name: level.dtype for name, level in cut.levels.items()},
        devices=_of(left, captured.devices) | {name: level.device for name, level in cut.levels.items()},
        cut=Cut(whole=captured, facts=facts, dropped=tuple(dropped), starts=frozenset(starts & left), left=shares),
    )


T = TypeVar("T")


def _of(names: set[str], values: Mapping[str, T]) -> dict[str, T]:
    return {name: value for name, value in values.items() if name in names}


class _Cutter:
    """A copy of a captured graph module from which branches are taken, with the means that replace them by node."""

    def __init__(self, captured: Capture) -> None:
        self.captured, (self.module, _) = captured, sharing_copy(captured.module)
        self.graph, self.levels = self.module.graph, dict[str, Tensor]()
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.graph.nodes}
        self.read = {node for node in self.graph.nodes if node.users}
        self.updates = any(updates(self.module, node) for node in self.graph.nodes)

    def drop(self, one: Measured) -> set[str]:
        """Takes a branch out. Returns the names of the nodes that now read something else."""
        add = self.nodes[one.branch.add]
        (kept,) = (node for node in add.all_input_nodes if node.name != one.branch.end)
        if one.level is None and (set(kept.users) <= {add, *self._inside(one.branch)} or not self.updates):
            readers = {node.name for node in add.users}
            add.replace_all_uses_with(kept)
            return readers
        add.op, add.target, add.args, add.kwargs = "call_function", torch.clone, (kept,), {}
        if one.level is not None:
            with self.graph.inserting_before(add):
                level = self.graph.get_attr(self._added(one.branch, one.level))
            add.target, add.args = torch.add, (kept, level)
            self.levels[level.name] = one.level
        return {add.name}

    def clean(self) -> None:
        """Erases the nodes that nothing reads any more, and the tensors and modules that only they used."""
        used: list[tuple[str, str]] = []
        for node in reversed(self.graph.nodes):
            if node in self.read and not node.users and node.op not in ("placeholder", "output"):
                used.append((node.op, str(node.target)))
                self.graph.erase_node(node)
        left = {f"{node.target}." for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        for op, target in used:
            own, (owner, _, name) = f"{target}.", target.rpartition(".")
            if op not in ("call_module", "get_attr") or any(o.startswith(own) or own.startswith(o) for o in left):
                continue
            if op == "call_module":
                self.module.delete_submodule(target)
            elif hasattr(self.module.get_submodule(owner), name):
                delattr(self.module.get_submodule(owner), name)
        self.graph.lint()
        self.module.recompile()

    def _inside(self, branch: Branch) -> set[fx.Node]:
        return {self.nodes[name] for name in branch.nodes}

    def _added(self, branch: Branch, level: Tensor) -> str:
        """The path of a new parameter for the mean of a branch, beside the module that the branch is named by."""
        owner, _, last = branch.name.partition(" ")[0].rpartition(".")
        modules = dict(self.module.named_modules())
        if owner not in modules:
            owner, last = "", f"{owner}_{last}".replace(".", "_")
        name = f"mean_of_{last}"
        while hasattr(modules[owner], name):
            name += "_"
        trained = any(p.requires_grad for p in self.module.parameters())
        modules[owner].register_parameter(name, nn.Parameter(level.clone(), requires_grad=trained))
        return f"{owner}.{name}".lstrip(".")
