"""Counts a model's parameters and floating-point operations, with torch.utils.flop_counter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.flop_counter import flop_counter, without_dynamo
from fxmerge.graph.nested import fresh

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class NodeCost:
    """The parameters that one node of a graph uses, and the FLOPs of one run of it on the example inputs.

    parameters:  {the parameter's path: elements}
    flops:       None if they could not be counted
    """

    parameters: Mapping[str, int]
    flops: int | None


@dataclass(frozen=True)
class Cost:
    """The size of a model and the cost of one run on the example inputs."""

    parameters: int  # elements; shared parameters count once
    flops: int  # a multiply-add counts as two, as in torch.utils.flop_counter
    by_node: Mapping[str, NodeCost]  # of the nodes of its graph that cost something

    def of(self, nodes: Iterable[str]) -> tuple[int, int | None]:
        """(parameters, FLOPs) of some nodes. What they share counts once, and a node without an entry counts as 0.

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
    flops = flops_by_node(module, inputs)
    return Cost(parameters(module), sum(flops.values()), _by_node(module, flops))


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
    with _counted(module, counter):
        module(*fresh(list(args)), **fresh(dict(kwargs)))
    try:
        flops = flops_by_node(graph, inputs)
    except Exception:  # the graph holds values of another run, such as the number of boxes, that no longer fit
        counts = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
        flops = _of_calls(graph, counts)
    return Cost(parameters(module), counter.get_total_flops(), _by_node(graph, flops))


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
    with _counted(module, counter):
        interpreter.run(*fresh(list(inputs)), enable_io_processing=False)
    return flops


@contextmanager
def _counted(module: nn.Module, counter: FlopCounterMode) -> Iterator[None]:
    """Counts what runs in evaluation mode, without gradients.

    No parameter requires one meanwhile: a view of such a parameter that a module takes, even under torch.no_grad, is an
    AssertionError of the counter.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        with evaluating(module), torch.no_grad(), without_dynamo(), counter:
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _of_calls(graph: fx.GraphModule, counts: Mapping[str, int]) -> dict[str, int]:
    """The FLOPs of the nodes that call modules, by those of each module in all of its calls."""
    calls: dict[str, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node.name)
    return {name: counts.get(path, 0) // len(names) for path, names in calls.items() for name in names}


def _by_node(module: fx.GraphModule, flops: Mapping[str, int]) -> dict[str, NodeCost]:
    """The cost of each node. A node uses the parameters of the module that it calls, or those among its operands.

    An operand may be made of parameters by other nodes, such as `w.T`.
    """
    first: dict[int, str] = {}  # id of a parameter -> its first path
    elements: dict[str, tuple[str, int]] = {}
    for path, p in module.named_parameters(remove_duplicate=False):
        elements[path] = first.setdefault(id(p), path), p.numel()
    made: dict[fx.Node, dict[str, int]] = {}  # nodes that depend on parameters alone -> those parameters
    found: dict[str, NodeCost] = {}
    for node in module.graph.nodes:
        target, inputs = str(node.target), node.all_input_nodes
        used = {path: size for n in inputs for path, size in made.get(n, {}).items()}
        if node.op == "get_attr":
            used = dict([elements[target]]) if target in elements else {}
        elif node.op == "call_module":
            used |= dict(elements[f"{target}.{name}"] for name, _ in module.get_submodule(target).named_parameters())
        computed = node.op in ("call_function", "call_method") and all(n in made for n in inputs)
        if node.op == "get_attr" or computed:
            made[node] = used
        spent = flops.get(node.name)
        if used or spent != 0:
            found[node.name] = NodeCost(used, spent)
    return found


def parameters(module: nn.Module) -> int:
    """The number of elements of all parameters; shared parameters count once."""
    return sum(p.numel() for p in module.parameters())
