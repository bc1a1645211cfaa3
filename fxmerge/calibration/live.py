"""The memory of a paired run: the activations that are stored at one time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from torch import fx

from fxmerge.ir.capture import Capture

# What a merge takes at most, in copies of what is stored of the original at one time: that of both graphs, gradients of
# layers that are fitted jointly and of probes, sampled positions. 8 to 12 were measured.
COPIES = 16
FLOAT = 4  # bytes


def samples_within(captured: Capture, count: int, memory: float, apart: Collection[str] = ()) -> int:
    """The number of samples, at least one, whose activations take `memory` GiB in a paired run.

    count: the samples of the example inputs; apart: nodes whose values are not stored
    """
    each = live_elements(captured, apart) / max(count, 1)
    return max(1, int(memory * 2**30 / (FLOAT * COPIES * max(each, 1.0))))


def last_readers(nodes: Sequence[fx.Node]) -> dict[str, str]:
    """{node: the last node that reads it}."""
    return {source.name: node.name for node in nodes for source in node.all_input_nodes}


def ends(last: Mapping[str, str]) -> dict[str, list[str]]:
    """{node: the nodes that it is the last to read}, from the last reader of each."""
    found: dict[str, list[str]] = {}
    for name, reader in last.items():
        found.setdefault(reader, []).append(name)
    return found


def live_elements(captured: Capture, apart: Collection[str] = ()) -> int:
    """The most elements that are stored at one time while the graph runs node by node on the example inputs."""
    nodes = list(captured.module.graph.nodes)
    ending = ends(last_readers(nodes))
    stored: dict[str, int] = {}
    most = 0
    for node in nodes:
        if node.op != "get_attr" and node.name not in apart and node.name in captured.shapes:
            stored[node.name] = prod(captured.shapes[node.name])
        most = max(most, sum(stored.values()))
        for name in (*ending.get(node.name, ()), *(() if node.users else (node.name,))):
            stored.pop(name, None)
    return most
