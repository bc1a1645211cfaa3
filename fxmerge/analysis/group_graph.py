"""The networkx graph of merge groups, layers and refusals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fxmerge.ir.groups import Group, Refusal
from fxmerge.ir.provenance import Layer

if TYPE_CHECKING:
    import networkx as nx


def graphml(graph: Any) -> str:
    """A `Grouping.graph` as GraphML text, with the type of every attribute."""
    import networkx as nx

    held = io.BytesIO()
    nx.write_graphml(graph, held, infer_numeric_types=False)
    return held.getvalue().decode("utf-8")


def group_graph(groups: list[Group], refusals: Sequence[Refusal], layers: Sequence[Layer]) -> nx.DiGraph[str]:
    """A DiGraph whose attributes are strings, integers and booleans.

    group       NAME             kind="group", channels, internal, mixers (how many)
    layer       layer:NODE       kind=op, module=path
    refusal     refused:NUMBER   kind="refused", module=path, channels, reason, where
    edges       layer -> group role="write", group -> layer role="read" or "carry", layer -> refusal role="write";
                channels: how many of the group's (refusal's) channels the layer holds
    """
    import networkx as nx

    graph: nx.DiGraph[str] = nx.DiGraph()
    for g in groups:
        graph.add_node(g.name, kind="group", channels=g.channels, internal=g.internal, mixers=len(g.mixers))
        for role, members in (("write", g.producers), ("carry", g.per_channel_params), ("read", g.consumers)):
            for m in members:
                graph.add_node(f"layer:{m.layer.node}", kind=str(m.layer.operation), module=m.layer.module)
                ends = (f"layer:{m.layer.node}", g.name) if role == "write" else (g.name, f"layer:{m.layer.node}")
                graph.add_edge(*ends, role=role, channels=len(m.channels))
    for number, r in enumerate(refusals):
        about = {"module": r.name, "channels": r.channels, "reason": r.reason, "where": r.where}
        graph.add_node(f"refused:{number}", kind="refused", **about)
        for layer in layers:
            if layer.module == r.name and layer.writes is not None:
                graph.add_node(f"layer:{layer.node}", kind=str(layer.operation), module=layer.module)
                graph.add_edge(f"layer:{layer.node}", f"refused:{number}", role="write", channels=r.channels)
    return graph
