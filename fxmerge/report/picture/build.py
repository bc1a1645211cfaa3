"""Build the picture of an analysis or a merge from its records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal, group_of_label, survivors
from fxmerge.ir.labels import holds, simplify, thin
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.plan import Plan, planned
from fxmerge.report.operations import function_name, operation
from fxmerge.report.picture.frames import nested
from fxmerge.report.picture.records import Arrow, Box, Picture, Role, Shade, colours, members

PASSED = 6  # operations listed on an arrow, at most
CONCATENATIONS = ("cat", "concat", "concatenate")


def draw(
    captured: Capture, facts: Provenance, grouping: Grouping, refusals: Sequence[Refusal], plan: Plan | None = None
) -> Picture:
    """The picture of an analysis or, with a plan, of a merge. Equal records give equal pictures."""
    return _Drawing(captured, facts, grouping, tuple(refusals), plan).finish()


def _distinct(labels: Tensor, atom: Tensor) -> Tensor:
    """The labels, with every axis along which their atoms do not vary narrowed to its first entry."""
    varies = thin(simplify(atom[labels])).shape
    return labels[tuple(slice(0, size) for size in varies)]


class _Drawing:
    """The state of one call of `draw`."""

    def __init__(
        self, captured: Capture, facts: Provenance, grouping: Grouping, refusals: tuple[Refusal, ...], plan: Plan | None
    ) -> None:
        self.captured, self.facts, self.grouping, self.refusals = captured, facts, grouping, refusals
        self.planned = {g.name: g for g in plan.groups} if plan else {}
        self.nodes: dict[str, fx.Node] = {n.name: n for n in captured.module.graph.nodes}
        self.layers: dict[str, list[Layer]] = defaultdict(list)
        for layer in facts.layers:
            self.layers[layer.node].append(layer)
        recorded = captured.recorded
        self.part = {
            n: p.path for p in (recorded.parts if recorded else ()) for run in (p.nodes, *p.again) for n in run
        }
        self.glue = recorded.glue if recorded else frozenset[str]()
        self.of_label, first = [], 0  # for each part of the grouping, (label_count,): the index of the group or -1
        for part in grouping.parts:
            number = group_of_label(part)
            self.of_label.append(np.where(number < 0, number, number + first))
            first += len(part.groups)
        self.alive = survivors(grouping, planned(grouping.everything, plan) if plan else [])  # (label_count,)
        self.atom = grouping.atom  # (label_count,) labels with one number have one atom in every part
        for part in grouping.parts[1:]:
            self.atom = self.atom * (int(part.atom.max()) + 1) + part.atom

    def finish(self) -> Picture:
        origins, through = self._origins()
        host = self._fused(origins)
        members: dict[str, list[str]] = defaultdict(list)
        for name in origins:
            members[host[name]].append(name)
        roles = self._roles()
        refused: dict[str, list[int]] = defaultdict(list)
        for number, refusal in enumerate(self.refusals):
            refused[refusal.name].append(number)
        boxes = [self._box(names, roles, refused) for names in members.values()]
        places, frames = nested([box.frame for box in boxes])
        boxes = [replace(b, frame=f, label=before + b.label) for b, (f, before) in zip(boxes, places, strict=True)]
        arrows: dict[tuple[str, str], Arrow] = {}
        for target, found in origins.items():
            for source, groups in found.items():
                ends = (host[source], host[target])
                if ends[0] != ends[1]:
                    known = arrows.get(ends, Arrow(*ends, (), through[target, source]))
                    arrows[ends] = Arrow(*ends, tuple(sorted({*known.groups, *groups})), known.through)
        return Picture(
            title=self.captured.name,
            shades=self._shades(),
            refusals=self.refusals,
            boxes=tuple(boxes),
            arrows=tuple(arrows.values()),
            frames=tuple(frames),
        )

    def _origins(self) -> tuple[dict[str, dict[str, set[int]]], dict[tuple[str, str], tuple[str, ...]]]:
        """Where the data of each drawn node comes from.

        Returns {drawn node: {drawn node that its data comes from: groups whose channels the data has}}, and for each
        (drawn node, drawn node that its data comes from) the operations in between.
        """
        passed: dict[str, dict[str, tuple[str, ...]]] = {}  # node -> {drawn node upstream: operations since}
        drawn: dict[str, dict[str, set[int]]] = {}
        through: dict[tuple[str, str], tuple[str, ...]] = {}
        pinning = self._pinning()
        joined: list[tuple[str, set[str]]] = []
        for name in self.facts.kinds:
            upstream: dict[str, tuple[str, ...]] = {}
            groups: dict[str, set[int]] = defaultdict(set)
            for source in dict.fromkeys(self.facts.sources.get(name, ())):
                for origin, ops in passed.get(source, {}).items():
                    upstream.setdefault(origin, ops)
                    groups[origin] |= self._groups_at(source)
            if self.facts.kinds[name] == "query":  # a size or another property, not data
                passed[name] = {}
                continue
            if not self._is_drawn(name, len(upstream), pinning):
                ops_here = () if self.facts.kinds[name] == "movement" else (self._operation(name),)
                passed[name] = {origin: (ops + ops_here)[:PASSED] for origin, ops in upstream.items()}
                continue
            if self._is_concatenation(name):
                # concat(a, b, c) is drawn as concat(concat(a, b), c) if concat(a, b) exists, which saves arrows
                whole = set(upstream)
                inner = max((j for j in joined if j[1] < whole), key=lambda j: len(j[1]), default=None)
                if inner is not None:
                    groups[inner[0]] = set().union(*(groups[o] for o in inner[1]))
                    upstream = {inner[0]: (), **{o: ops for o, ops in upstream.items() if o not in inner[1]}}
                joined.append((name, whole))
            drawn[name] = {origin: groups[origin] for origin in upstream}
            through |= {(name, origin): ops for origin, ops in upstream.items()}
            passed[name] = {name: ()}
        return drawn, through

    def _is_drawn(self, name: str, streams: int, pinning: set[str]) -> bool:
        kind = self.facts.kinds[name]
        if name in self.layers or kind in ("input", "output") or name in pinning:
            return True
        if kind == "unknown" and self.nodes[name].op == "call_module":
            return True
        around = (self.facts.labels.get(n) for n in (name, *self.facts.sources.get(name, ())))
        return (streams > 1 or kind == "contraction") and any(labels is not None and holds(labels) for labels in around)

    def _pinning(self) -> set[str]:
        """Nodes without a rule that are the first to pin some channel."""
        seen, found = np.zeros(int(self.grouping.atom.max()) + 1, dtype=bool), set()
        seen[int(self.grouping.atom[0])] = True
        for pin in self.facts.pins:
            inside = self.grouping.atom[pin.labels.reshape(-1)].numpy()
            if not seen[inside].all():
                seen[inside] = True
                if self.facts.kinds.get(pin.node) == "unknown":
                    found.add(pin.node)
        return found

    def _groups_at(self, name: str) -> set[int]:
        labels = self.facts.labels.get(name)
        return self._groups_of(labels) if labels is not None else set()

    def _groups_of(self, labels: Tensor) -> set[int]:
        held = thin(labels).numpy()
        return {int(number) for of_label in self.of_label for number in np.unique(of_label[held]) if number >= 0}

    def _fused(self, origins: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
        """For each drawn node, the node whose box contains it.

        A norm shares the box of the layer before it if it is that layer's only user. The code that a recorded model
        runs between two layers is one box.
        """
        targets: dict[str, int] = defaultdict(int)
        for found in origins.values():
            for source in found:
                targets[source] += 1
        host: dict[str, str] = {}
        code = ""  # the current box of the model's own code
        for name, found in origins.items():
            if name in self.glue and name not in self.layers and self.facts.kinds[name] not in ("input", "output"):
                code = host[name] = code or name
                continue
            code = ""
            only = next(iter(found)) if len(found) == 1 else ""
            fits = only and targets[only] == 1 and self.facts.kinds[name] == "per_channel_param"
            fits = fits and self.facts.kinds[only] == "producer" and self._place(only)[0] == self._place(name)[0]
            host[name] = only if fits else name
        return host

    def _roles(self) -> dict[str, list[tuple[int, Role]]]:
        roles: dict[str, list[tuple[int, Role]]] = defaultdict(list)
        for number, g in enumerate(self.grouping.everything):
            for role, nodes in members(g).items():
                for node in nodes:
                    roles[node].append((number, role))
        return roles

    def _box(
        self, names: list[str], roles: Mapping[str, list[tuple[int, Role]]], refused: Mapping[str, list[int]]
    ) -> Box:
        first, last = names[0], names[-1]
        places = [self._place(name) for name in names]
        paths = tuple(f"{owner}.{own}" if owner else own for owner, own in places)
        before, after = self._widths(last)
        mine: dict[tuple[int, Role], None] = dict.fromkeys(role for name in names for role in roles.get(name, ()))
        member = {number for number, _ in mine}
        for number in sorted(self._groups_at(last) - member):
            mine[number, "pass"] = None
        why = [r for name in names for layer in self.layers.get(name, ()) for r in refused.get(layer.module, ())]
        label, operation = " · ".join(own for _, own in places), self._operation(first)
        kind: str = "concat" if self._is_concatenation(first) else self.facts.kinds[first]
        if first in self.glue and kind not in ("input", "output") and first not in self.layers:
            label, operation, kind, before, after = "code", "the model's own", "code", 0, 0
        return Box(
            id=first,
            label=label,
            frame=places[0][0],
            op=operation,
            kind=kind,
            nodes=tuple(names),
            modules=paths,
            before=before,
            after=after,
            roles=tuple(mine),
            refused=tuple(dict.fromkeys(why)),
        )

    def _widths(self, name: str) -> tuple[int, int]:
        """The number of channels of a node's output before and after the merge; (0, 0) if it is not known."""
        labels = self.facts.labels.get(name)
        if labels is None or not holds(labels):
            return 0, 0
        labels = _distinct(thin(labels), self.atom)
        if name not in self.layers and len(torch.unique(self.atom[labels])) < labels.numel():
            return 0, 0  # the axes hold positions, not channels
        return labels.numel(), int(self.alive[labels].sum())

    def _shades(self) -> tuple[Shade, ...]:
        groups = self.grouping.everything
        reasons = {r.name: r.reason for r in self.refusals}
        found = []
        for g, colour in zip(groups, colours([not g.internal for g in groups]), strict=True):
            plan = self.planned.get(g.name)
            # a refusal with the name of a planned group is about other channels of the same producer
            why = reasons.get(g.name, "") if plan is None and self._is_refused(g) else ""
            kept = len(plan.kept) if plan else g.channels
            shade = Shade(
                name=g.name, channels=g.channels, kept=kept, colour=colour, shared=not g.internal, refused=why
            )
            found.append(shade)
        return tuple(found)

    def _is_refused(self, group: Group) -> bool:
        return any(r.name == group.name and r.channels == group.channels for r in self.refusals)

    def _operation(self, name: str) -> str:
        """What a node computes, for display: a function's name, or a module's class and kernel size."""
        node = self.nodes[name]
        if node.op in ("placeholder", "output"):
            return "input" if node.op == "placeholder" else "output"
        module = self.captured.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        kernel = getattr(module, "kernel_size", None)
        sides = kernel if isinstance(kernel, tuple) else ()
        return " ".join([operation(node, self.captured.module), *(["x".join(map(str, sides))] if sides else [])])

    def _is_concatenation(self, name: str) -> bool:
        node = self.nodes[name]
        called = node.op in ("call_function", "call_method") and function_name(node) in CONCATENATIONS
        return called and self.facts.kinds[name] == "movement"

    def _place(self, name: str) -> tuple[str, str]:
        """(path of the module that contains a node, the node's name within it)."""
        node = self.nodes[name]
        layers = self.layers.get(name, [])
        path = layers[0].module if layers else str(node.target) if node.op == "call_module" else ""
        if path:
            owner, _, own = path.rpartition(".")
            return owner, own
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inside = [self.part.get(name, ""), str(stack[-1][0]) if stack else ""]
        return ".".join(p for p in inside if p), name
