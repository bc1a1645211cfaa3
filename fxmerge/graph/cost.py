"""Counts a model's parameters and floating-point operations, with torch.utils.flop_counter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.flop_counter import flop_counter
from fxmerge.graph.nested import fresh


@dataclass(frozen=True)
class NodeCost:
    """The parameters that one node of a graph uses, and the FLOPs of one run of it on the example inputs.

    parameters:  {parameter, or the part of it that the node uses: elements}
    flops:       None if they could not be counted
    """

    parameters: Mapping[str, int]
    flops: int | None


@dataclass(frozen=True)
class Cost:
    """The size of a model and the cost of one run on the example inputs."""

    parameters: int  # elements; shared parameters count once
    flops: int  # a multiply-add counts as two, as in torch.utils.flop_counter
    by_node: Mapping[str, NodeCost]  # of the nodes of its graph

    def of(self, nodes: Iterable[str]) -> tuple[int, int | None]:
        """(parameters, FLOPs) of some nodes. What they share counts once, and a node that is gone counts as 0.

        FLOPs are None if they could not be counted for one of the nodes.
        """
        found = [self.by_node[name] for name in dict.fromkeys(nodes) if name in self.by_node]
        used = {path: size for node in found for path, size in node.parameters.items()}
        flops = [node.flops for node in found if node.flops is not None]
        return sum(used.values()), sum(flops) if len(flops) == len(found) else None


def cost(module: fx.GraphModule, inputs: Sequence[Any]) -> Cost:
    """The cost of a graph module, given the values of its placeholders.

    Elementwise ops count as 0 FLOPs, as in torch.utils.flop_counter.
    """
    run = _counted(module, inputs)
    return Cost(parameters(module), sum(run.flops.values()), _by_node(module, run.flops, run.sizes))


def call_cost(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    graph: fx.GraphModule,
    inputs: Sequence[Any],
) -> Cost:
    """The cost of one call of a module that runs more than its graph.

    graph, inputs:  its graph, and the values of the graph's placeholders. The nodes' FLOPs are counted in a run of the
                    graph. If it does not run by itself, only those of its modules are known, from the call.
    """
    counter = flop_counter()
    with evaluating(module), torch.no_grad(), counter:
        module(*fresh(list(args)), **fresh(dict(kwargs)))
    try:
        run = _counted(graph, inputs)
        by_node = _by_node(graph, run.flops, run.sizes)
    except Exception:  # the graph holds values of another run, such as the number of boxes, that no longer fit
        counts = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
        by_node = _by_node(graph, _of_calls(graph, counts), {})
    return Cost(parameters(module), counter.get_total_flops(), by_node)


def flops_by_node(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """The FLOPs of each node, by its name, given the values of the graph's placeholders."""
    return _counted(module, inputs).flops


class _Counting(fx.Interpreter):
    """Runs a graph and counts the FLOPs of each node, and the elements of its value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.counter = flop_counter()
        self.flops: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        self.flops[n.name] = self.counter.get_total_flops() - before
        if isinstance(value, Tensor):
            self.sizes[n.name] = value.numel()
        return value


def _counted(module: fx.GraphModule, inputs: Sequence[Any]) -> _Counting:
    run = _Counting(module)
    with evaluating(module), torch.no_grad(), run.counter:
        run.run(*fresh(list(inputs)), enable_io_processing=False)
    return run


def _of_calls(graph: fx.GraphModule, counts: Mapping[str, int]) -> dict[str, int]:
    """The FLOPs of the nodes that call modules, by those of each module in all of its calls."""
    calls: dict[str, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node.name)
    return {name: counts.get(path, 0) // len(names) for path, names in calls.items() for name in names}


def _by_node(module: fx.GraphModule, flops: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, NodeCost]:
    """The cost of each node. A node uses the parameters of the module that it calls, or those among its operands.

    An operand may be made of parameters by further nodes (`x @ w.T`, or the part of a weight that is cut out for the
    queries of an attention). If it has fewer elements than they have, it counts as a part of its own.
    """
    first: dict[int, str] = {}  # id of a parameter -> its first path
    elements: dict[str, tuple[str, int]] = {}
    for path, p in module.named_parameters(remove_duplicate=False):
        elements[path] = first.setdefault(id(p), path), p.numel()
    made: dict[fx.Node, dict[str, int]] = {}  # nodes that depend on parameters alone -> what they are made of
    found: dict[str, NodeCost] = {}
    for node in module.graph.nodes:
        target, inputs = str(node.target), node.all_input_nodes
        used = {path: size for n in inputs for path, size in made.get(n, {}).items()}
        if node.op == "get_attr":
            used = dict([elements[target]]) if target in elements else {}
        elif node.op == "call_module":
            inside = [elements[f"{target}.{name}"] for name, _ in module.get_submodule(target).named_parameters()]
            used.update(inside)
        computed = node.op in ("call_function", "call_method") and all(n in made for n in inputs)
        if node.op == "get_attr" or computed:
            whole = sum(used.values())
            made[node] = {node.name: sizes[node.name]} if sizes.get(node.name, whole) < whole else used
        found[node.name] = NodeCost(used, flops.get(node.name))
    return found


def parameters(module: nn.Module) -> int:
    """The number of elements of all parameters; shared parameters count once."""
    return sum(p.numel() for p in module.parameters())
