"""Waists of a graph, and the values between them that a paired run computes again instead of storing them.

A *waist* is a node whose value is all that later nodes read of the activations so far, such as the residual stream
after each half of a transformer's layer. What lies between two waists can be computed from the first one, a batch at a
time, at the cost of one more forward pass of these nodes whenever they are read. Where the activations of all batches
are large, two kinds of them are therefore not stored:

    what is cheap to compute          activations, norms, views, sums, copies in another precision
    what is wider than the waist      the inner channels of an MLP, scores of attention

Stored are the waist, and outputs of layers that are no wider: queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxmerge.calibration.live import last_readers
from fxmerge.graph.ops import updates
from fxmerge.ir.provenance import Kind

WIDE = 2**26  # elements over all batches, above which values are computed again
CHEAP: frozenset[Kind] = frozenset(("movement", "per_channel", "per_channel_param", "tie", "mixer"))
COSTLY: frozenset[Kind] = frozenset(("producer", "contraction"))


@dataclass(frozen=True)
class Between:
    """The nodes between two waists whose values may be computed again, by name."""

    waists: frozenset[str] = frozenset()
    cheap: frozenset[str] = frozenset()
    costly: frozenset[str] = frozenset()  # only if they are wider than the last waist


def between(module: fx.GraphModule, kinds: Mapping[str, Kind], apart: Container[str] = ()) -> Between:
    """The nodes between waists. Those between two waists of which one is updated in place are left out.

    kinds: of the nodes' rules; apart: nodes that are left out
    """
    nodes = list(module.graph.nodes)
    waists, flow = _waists(nodes, kinds)
    cheap: set[str] = set()
    costly: set[str] = set()
    inside: list[fx.Node] = []
    begun = False  # has there been a waist?
    for node in nodes:
        if node not in flow:
            continue
        if node.name not in waists:
            inside.append(node)
            continue
        if begun and not any(updates(module, n) for n in (*inside, node)):
            named = [n.name for n in inside if n.name not in apart]
            cheap.update(name for name in named if kinds.get(name) in CHEAP)
            costly.update(name for name in named if kinds.get(name) in COSTLY)
        begun, inside = True, []
    return Between(frozenset(waists), frozenset(cheap), frozenset(costly))


def _waists(nodes: Sequence[fx.Node], kinds: Mapping[str, Kind]) -> tuple[set[str], set[fx.Node]]:
    """The names of the waists; the nodes that depend on a layer that writes channels, or are one."""
    flow: set[fx.Node] = set()
    waists: set[str] = set()
    live: set[str] = set()  # what later nodes still read
    ending: dict[str, list[str]] = {}
    for name, reader in last_readers(nodes).items():
        ending.setdefault(reader, []).append(name)
    for node in nodes:
        live.difference_update(ending.get(node.name, ()))
        if kinds.get(node.name) == "producer" or any(source in flow for source in node.all_input_nodes):
            flow.add(node)
            if node.users:
                live.add(node.name)
            if live == {node.name}:
                waists.add(node.name)
    return waists, flow
