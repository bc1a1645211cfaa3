"""Pruning by masks: the inputs of a consumer that depend on dropped channels are set to zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxmerge


def masked_by_hand(result: fxmerge.Result, x: Tensor) -> Tensor:
    """The original's output when those inputs of each consumer are zeroed that depend on dropped channels.

    These inputs are found by changing the dropped rows of the producers and comparing, without fxmerge's index maps.
    """
    module = copy.deepcopy(result.analysis.captured.module).eval()
    groups = {g.name: g for g in result.analysis.groups}
    zeroed: dict[str, Tensor] = {}
    for planned in result.plan.groups:
        group = groups[planned.name]
        dropped = torch.tensor(sorted(set(range(planned.channels)) - set(planned.kept)))
        shaken = copy.deepcopy(module)
        for producer in group.producers:
            here, local = producer.local(dropped)
            assert here.all()
            for path in producer.layer.params.values():
                value = shaken.get_parameter(path)
                places = producer.where[local].flatten()
                rows = value.data.movedim(_out_axis(producer.layer), 0) if value.dim() > 1 else value.data
                rows[places] += _noise(rows[places])
        consumers = {consumer.layer.node for consumer in group.consumers}
        before, after = (Watched(m, consumers, {}) for m in (module, shaken))
        before.run(x)
        after.run(x)
        for node in consumers:
            zeroed[node] = (after.seen[node] != before.seen[node]) | zeroed.get(node, torch.tensor(False))
    out: Tensor = Watched(module, set(zeroed), zeroed).run(x)
    return out.detach()


def _out_axis(layer: Any) -> int:
    """The axis of a weight that its layer writes: the last of a matrix product's, or of a stack of these."""
    return (2 if layer.op == "experts" else 1) if layer.transposed else (1 if layer.op == "experts" else 0)


def _noise(like: Tensor) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


class Watched(fx.Interpreter):
    """Records the inputs of some nodes, and zeroes the channels of these that contain one of the given entries."""

    def __init__(self, module: fx.GraphModule, nodes: set[str], zeroed: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.nodes, self.zeroed = nodes, zeroed
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        source = n.args[-2 if self.matrix(n) else 0] if n.name in self.nodes else None
        if isinstance(source, fx.Node):
            value = self.env[source].clone()
            self.seen[n.name] = value
            if n.name in self.zeroed:
                self.env[source] = value * ~self.channels(n, self.zeroed[n.name])
        return super().run_node(n)

    def matrix(self, n: fx.Node) -> bool:
        return n.target in ("addmm", torch.addmm)

    def channels(self, n: fx.Node, entries: Tensor) -> Tensor:
        """The channels that contain one of the entries: on the last axis for linear and recurrent layers, or axis 1."""
        target = self.module.get_submodule(str(n.target)) if n.op == "call_module" else n.target
        modules, names = (nn.Linear, nn.RNNBase, nn.RNNCellBase), ("lstm", "gru", "rnn")
        recurrent = any(name in str(target).lower() for name in names)
        linear = isinstance(target, modules) or target is F.linear or self.matrix(n) or recurrent
        axis = entries.dim() - 1 if linear else 1
        others = [a for a in range(entries.dim()) if a != axis]
        return entries.amax(others, keepdim=True) if others else entries
