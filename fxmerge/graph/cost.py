"""Counts a model's parameters and floating-point operations, with torch.utils.flop_counter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.flop_counter import flop_counter
from fxmerge.graph.nested import fresh


@dataclass(frozen=True)
class Cost:
    """The size of a model and the cost of one run on the example inputs."""

    parameters: int  # elements; shared parameters count once
    flops: int  # a multiply-add counts as two, as in torch.utils.flop_counter
    by_module: dict[str, tuple[int, int]]  # module path -> (parameters, flops)


def cost(module: fx.GraphModule, inputs: Sequence[Any]) -> Cost:
    """The cost of a graph module, given the values of its placeholders.

    Elementwise ops count as 0 FLOPs, as in torch.utils.flop_counter.
    """
    by_node = flops_by_node(module, inputs)
    flops: dict[str, int] = {}
    for node in module.graph.nodes:
        name = str(node.target) if node.op == "call_module" else node.name
        flops[name] = flops.get(name, 0) + by_node[node.name]
    return Cost(parameters(module), sum(by_node.values()), _by_module(module, flops))


def flops_by_node(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """The FLOPs of each node, by its name, given the values of the graph's placeholders."""
    counter = flop_counter()
    flops: dict[str, int] = {}

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = counter.get_total_flops()
            value = super().run_node(n)
            flops[n.name] = counter.get_total_flops() - before
            return value

    interpreter = Counting(module)
    interpreter.extra_traceback = False
    with evaluating(module), torch.no_grad(), counter:
        interpreter.run(*fresh(list(inputs)), enable_io_processing=False)
    return flops


def call_cost(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cost:
    """The cost of one call of any module."""
    counter = flop_counter()
    with evaluating(module), torch.no_grad(), counter:
        module(*fresh(list(args)), **fresh(dict(kwargs)))
    counts = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    return Cost(parameters(module), counter.get_total_flops(), _by_module(module, counts))


def _by_module(module: nn.Module, flops: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The (parameters, FLOPs) of each submodule that has any; the parameters of its submodules are not counted."""
    owners: dict[str, tuple[int, int]] = {}
    for name, sub in module.named_modules():
        own = sum(p.numel() for p in sub.parameters(recurse=False))
        if name and (own or flops.get(name)):
            owners[name] = (own, flops.get(name, 0))
    return owners


def parameters(module: nn.Module) -> int:
    """The number of elements of all parameters; shared parameters count once."""
    return sum(p.numel() for p in module.parameters())
