"""The data of the page's panel for each box: its cost, and for each of its layers the weights and the attributes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.operator_schemas import normalize_function

from fxmerge.graph.cost import Cost
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Layer
from fxmerge.planning.statistics import state
from fxmerge.report.operations import operation
from fxmerge.report.picture.records import Box

LAYERS = 12  # nodes of one box, at most
ENTRIES = 32  # weights and attributes of one node, at most
TEXT = 60  # characters of an attribute, at most

Constants = dict[str, int | str]


def layer_panels(
    boxes: Sequence[Box],
    captured: Capture,
    layers: Sequence[Layer],
    costs: Sequence[Cost],
    graph: fx.GraphModule | None,
) -> list[dict[str, Any]]:
    """The panel of each box, as plain data.

    costs: of the original and, after a merge, of the merged model
    graph: the merged model's, after a merge
    """
    found = _Details(captured, layers, graph)
    return [
        {
            "parameters": [c.of(box.nodes)[0] for c in costs],
            "flops": [c.of(box.nodes)[1] for c in costs],
            "layers": [found.of(name) for name in box.nodes[:LAYERS]],
        }
        for box in boxes
    ]


class _Details:
    """The weights and attributes of nodes in the original and, if there is one, in the merged graph."""

    def __init__(self, captured: Capture, layers: Sequence[Layer], graph: fx.GraphModule | None) -> None:
        self.captured, self.graph = captured, graph
        self.nodes = {n.name: n for n in captured.module.graph.nodes}
        self.after = {n.name: n for n in graph.graph.nodes} if graph else {}
        self.tensors = state(captured.module)
        self.merged = state(graph) if graph else {}
        self.params: dict[str, dict[str, str]] = defaultdict(dict)  # node -> {path: slot}
        for layer in layers:
            self.params[layer.node] |= {path: slot for slot, path in layer.params.items()}

    def of(self, name: str) -> dict[str, Any]:
        """One node: what it computes, its output on the example inputs, its two tables.

        Of an entry of a table, the value after the merge is there only if it differs.
        """
        node = self.nodes[name]
        before = _constants(node, self.captured.module)
        after = _constants(self.after[name], self.graph) if self.graph and name in self.after else before
        shape, dtype = self.captured.shapes.get(name), self.captured.dtypes.get(name)
        return {
            "op": operation(node, self.captured.module),
            "output": [*shape] if shape is not None else None,
            "dtype": str(dtype).removeprefix("torch.") if dtype else "",
            "weights": [*self._weights(node)][:ENTRIES],
            "attributes": [
                [key, value, *([after[key]] if after.get(key, value) != value else [])] for key, value in before.items()
            ][:ENTRIES],
        }

    def _weights(self, node: fx.Node) -> Iterator[list[Any]]:
        """(name, shape, shape after the merge if it differs) of each parameter and buffer; no shape if it is new."""
        slots = dict(self.params.get(node.name, {}))
        if node.op == "call_module":
            prefix = f"{node.target}."
            slots |= {path: path[len(prefix) :] for path in _inside(prefix, self.tensors, self.merged)}
        for path, slot in slots.items():
            before, after = (_shape(tensors, path) for tensors in (self.tensors, self.merged))
            if before is not None or after is not None:
                yield [slot, before, *([after] if after not in (before, None) else [])]


def _inside(prefix: str, *states: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(path for tensors in states for path in tensors if path.startswith(prefix)))


def _shape(tensors: Mapping[str, Tensor], path: str) -> list[int] | None:
    return [*tensors[path].shape] if path in tensors else None


def _constants(node: fx.Node, module: nn.Module) -> Constants:
    """What a node is configured with: the plain attributes of its module, or its plain arguments."""
    if node.op == "call_module":
        held = vars(module.get_submodule(str(node.target)))
        found = {k: v for k, v in held.items() if not k.startswith("_") and k != "training"}
    elif node.op == "call_function":
        found = _arguments(node)
    else:
        found = {f"argument {at}": value for at, value in enumerate(node.args)} | dict(node.kwargs)
    return {key: text for key, value in found.items() if (text := _plain(value)) is not None}


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function by name; those whose name is not known by position."""
    target: Any = node.target
    try:
        named = normalize_function(target, node.args, dict(node.kwargs), normalize_to_only_use_kwargs=True)
    except (RuntimeError, TypeError, ValueError):
        named = None
    if named is not None:
        return dict(named.kwargs)
    return {f"argument {at}": value for at, value in enumerate(node.args)} | dict(node.kwargs)


def _plain(value: Any) -> int | str | None:
    """A number, a string, or a tuple or list of these, as it is shown; None for anything else, and for nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, (bool, float, str)):
        return str(value)[:TEXT]
    if isinstance(value, (tuple, list)) and value and all(isinstance(v, (bool, int, float, str)) for v in value):
        return ", ".join(map(str, value))[:TEXT]
    return None
