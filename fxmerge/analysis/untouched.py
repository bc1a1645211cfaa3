"""Which parameters no layer of the graph holds channels with, and why: nothing is left out of a report in silence."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxmerge.errors import source_line
from fxmerge.ir.capture import FOLDED, Capture
from fxmerge.ir.provenance import Untouched
from fxmerge.rules.call_names import layer_name
from fxmerge.rules.facts import FactsBuilder
from fxmerge.weights.by_path import at


def untouched(capture: Capture, facts: FactsBuilder, owners: Mapping[int, str]) -> tuple[Untouched, ...]:
    """The parameters that no layer of the graph holds channels with, by the user's layers, and why.

    owners: identity of a parameter -> the path that the facts know it by
    """
    found: dict[str, Untouched] = {}
    module = capture.module
    held = {id(at(module, path)) for layer in facts.layers for path in layer.params.values()}
    frozen = {id(at(module, path)): about for path, about in facts.frozen.items()}
    for path, value in module.named_parameters():
        if id(value) not in held:
            reason, node = frozen.get(id(value), ("has no channels of its own", None))
            mine = torch.zeros(facts.label_count, dtype=torch.bool)
            labels = facts.elements.get(owners.get(id(value), path))
            if labels is not None:
                mine[labels] = True
            pin = next((p for p in facts.pins if bool(mine[p.labels].any())), None) if node is None else None
            name = str(node.target) if node is not None and node.op == "call_module" else layer_name(path)
            where = source_line(node) if node is not None else pin.where if pin else ""
            size = value.size(0) if value.dim() else 1
            found.setdefault(name, Untouched(name, size, pin.reason if pin else reason, where))
    for name, size in _not_run(capture).items():
        found.setdefault(name, Untouched(name, size, "does not run on the example inputs", ""))
    return tuple(found.values())


def _not_run(capture: Capture) -> dict[str, int]:
    """Layers of the user's model that the graph does not call, and the size of their first axis."""
    nodes = capture.whole.module.graph.nodes
    called = tuple(f"{n.target}." for n in nodes if n.op == "call_module")
    owners = {str(n.target).rpartition(".")[0] for n in nodes if n.op == "get_attr"}
    folded = {path for n in nodes for path in n.meta.get(FOLDED, ())}
    names: dict[int, tuple[int, list[str]]] = {}
    users = capture.model.named_parameters(remove_duplicate=False) if capture.model is not None else ()
    for path, value in users:
        own = path.partition(".parametrizations.")[0] + ".weight" if ".parametrizations." in path else path
        names.setdefault(id(value), (value.size(0) if value.dim() else 1, []))[1].append(own)
    found: dict[str, int] = {}
    for size, paths in names.values():  # a tied weight runs if one of its names does
        if not any(p.startswith(called) or p.rpartition(".")[0] in owners or p in folded for p in paths):
            found.setdefault(layer_name(paths[0]), size)
    return found
