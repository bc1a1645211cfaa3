"""Provenance: one run of the graph on labels tells which channel went where.

Every channel that a parameter creates gets a label, and the graph is interpreted on label tensors of the activations'
shapes, one rule for each op (`rules.RULES`). What comes back are facts: ties (labels that must live or die together),
pins (labels that must stay, with the reason and the user's source line), blocks (rows that must lose equally many).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.errors import source_line
from fxmerge.graph import nested
from fxmerge.graph.ops import by_name, in_place, overload_name
from fxmerge.ir.capture import FOLDED, Capture
from fxmerge.ir.labels import fixed, numbers
from fxmerge.ir.provenance import (
    Block,
    Bond,
    Contraction,
    Lab,
    Layer,
    Param,
    ParamLabels,
    Pin,
    Provenance,
    Tie,
    Untouched,
    View,
)
from fxmerge.rules import movement
from fxmerge.rules.context import Context, Opaque, layer_name
from fxmerge.rules.lookup import attributes_of, rule_of
from fxmerge.weights.by_path import at


class _Run:
    """The interpreter: walks the graph once, one rule a node."""

    def __init__(self, capture: Capture, whole: bool) -> None:
        self.capture, self.whole = capture, whole
        self.count, self.placeholders = 1, 0
        self.axes: dict[str, dict[int, Tensor]] = {}
        self.elements: dict[str, Tensor] = {}
        self.groups: dict[str, int] = {}
        self.frozen: dict[str, tuple[str, fx.Node]] = {}
        self.ties: list[Tie] = []
        self.pins: list[Pin] = []
        self.blocks: list[Block] = []
        self.bonds: list[Bond] = []
        self.contractions: list[Contraction] = []
        self.numbers: list[Tensor] = []  # labels of blocks, which are no channels
        self.mixers: list[tuple[str, Tensor]] = []
        self.layers: list[Layer] = []
        self.kinds: dict[str, Any] = {}
        self.commutes: dict[str, bool] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.owners: dict[int, str] = {}  # identity of a parameter -> the one path that stands for it
        self.values: dict[fx.Node, Any] = {}
        self.renewed: dict[fx.Node, fx.Node] = {}  # a node -> the node that last updated its value in place

    def new(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)

    def param(self, path: str, value: Tensor) -> Param:
        """Shared parameters are one: the first path that names the tensor stands for all."""
        return Param(self.owners.setdefault(id(value), path), value)

    def run(self) -> Provenance:
        held = self.capture.recorded.held if self.capture.recorded else {}
        for node in self.capture.module.graph.nodes:
            self.values[node] = self.step(node)
            if node.name in held:
                ctx = Context(self, node, node.name, None, ())
                for leaf in nested.leaves(self.values[node]):
                    if isinstance(leaf, Lab):
                        ctx.pin(leaf.t, held[node.name])
        return self.facts()

    def latest(self, node: fx.Node) -> fx.Node:
        while node in self.renewed:
            node = self.renewed[node]
        return node

    def step(self, node: fx.Node) -> Any:
        sources = [self.latest(n) for n in node.all_input_nodes]
        self.sources[node.name] = tuple(n.name for n in sources)
        if node.op == "placeholder":
            self.kinds[node.name] = "input"
            shape = self.capture.shapes.get(node.name)
            self.placeholders += 1
            given = self.capture.inputs[self.placeholders - 1]
            inside = nested.tree(lambda v: Lab(fixed(v.shape)) if isinstance(v, Tensor) else v, given)
            return Lab(fixed(shape)) if shape is not None else inside
        if node.op == "get_attr":
            value = at(self.capture.module, str(node.target))
            self.kinds[node.name] = "query"
            if node.meta.get("constant"):
                return value
            return self.param(str(node.target), value) if isinstance(value, Tensor) else value

        def operand(value: Any) -> Any:
            return self.values[self.latest(value)] if isinstance(value, fx.Node) else value

        args, kwargs = nested.tree(operand, list(node.args)), nested.tree(operand, dict(node.kwargs))
        if node.op == "output":
            self.kinds[node.name] = "output"
            ctx = Context(self, node, "output", None, args)
            for leaf in nested.leaves(args):
                if isinstance(leaf, Lab):
                    ctx.pin(leaf.t, "is the model's output")
                elif isinstance(leaf, Param):
                    ctx.freeze(leaf, "is the model's output")
            return None
        return self.call(node, args, kwargs)

    def call(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Find the node's row and run it; without one, everything that the node touches is pinned."""
        target: Any = node.target
        rule, why = rule_of(node, self.capture.module), "has no rule"
        if node.op == "call_module":
            target = self.capture.module.get_submodule(str(node.target))
            if target._forward_hooks or target._forward_pre_hooks:
                rule, why = None, "has forward hooks"
            elif rule is None:
                why = f"is a {type(target).__name__}, which has no rule"
        operands, as_given = [*args, *kwargs.values()], (tuple(args), kwargs)
        if rule is not None and overload_name(target) is not None and rule.kind != "movement":
            accepted = dict(inspect.signature(rule.apply).parameters)
            args, kwargs = by_name(target, args, kwargs, accepted)
        if rule is not None and node.op != "call_module" and rule.kind != "movement":
            kwargs = {_NUMPY.get(name, name): value for name, value in kwargs.items()}
        ctx = Context(self, node, rule.name if rule else str(node.target), target, operands)
        dynamic = any(isinstance(leaf, (Lab, Param, Opaque)) for leaf in nested.leaves(operands))
        if not dynamic and node.op != "call_module":
            self.kinds[node.name] = "query"
            return movement.run(target, *as_given)  # a plain value: computed as it stands
        self.kinds[node.name] = "unknown"
        if rule is None or any(isinstance(leaf, Opaque) for leaf in nested.leaves(operands)):
            return ctx.unknown(why)
        for attribute in attributes_of(target) if node.op == "call_module" else ():
            value = getattr(target, attribute)
            is_tensor = isinstance(value, Tensor)
            kwargs[attribute] = self.param(f"{node.target}.{attribute}", value) if is_tensor else value
        if getattr(target, "padding_mode", "zeros") != "zeros":
            kwargs.pop("padding", None)
        pins = len(self.pins)
        try:
            out = rule.apply(ctx, *args, **kwargs)
        except (TypeError, IndexError, RuntimeError, ValueError) as error:
            del self.pins[pins:]
            return ctx.unknown(f"is called in a way that its rule does not know ({error})")
        self.kinds[node.name] = ctx.kind or rule.kind
        if isinstance(out, View) and rule.kind != "movement":
            out = Lab(out.t)
        commutes = rule.commutes
        self.commutes[node.name] = bool(commutes(ctx, *args, **kwargs) if callable(commutes) else commutes)
        if in_place(node, target) and node.args and isinstance(node.args[0], fx.Node):
            self.renewed[self.latest(node.args[0])] = node
        return out

    def spare(self) -> None:
        """Rows of a table that nothing takes follow the others, so that what is left of it is a rectangle."""
        met = torch.zeros(self.count, dtype=torch.bool)
        for tie in self.ties:
            met[tie.left], met[tie.right] = True, True
        for pin in self.pins:
            met[pin.labels] = True
        for elements in self.elements.values():
            for axis in range(elements.dim() if elements.dim() > 1 else 0):
                along = elements.movedim(axis, 0).flatten(1)
                taken = met[along].any(1)
                if bool(taken.any()) and not bool(taken.all()):
                    first, others = along[taken][:1], along[~taken]
                    self.ties.append(Tie("", first.expand_as(others).flatten(), others.flatten()))

    def facts(self) -> Provenance:
        self.spare()
        params = {}
        for path in sorted({*self.axes, *self.elements}):
            labels = ParamLabels(path, self.axes.get(path, {}), self.elements.get(path), self.groups.get(path, 1))
            params[path] = labels
            reason, node = self.frozen.get(path, ("", None))
            if path in self.axes and path in self.elements:
                reason = f"{path} is used both as a weight and element by element"
            if reason:
                held = [*labels.axes.values(), *([labels.elements] if labels.elements is not None else [])]
                everything = torch.cat([t.flatten() for t in held])
                where = source_line(node) if node is not None else ""
                self.pins.append(Pin(numbers(everything), reason, node.name if node else "", where))
        stands = {n.name: v.t for n, v in self.values.items() if isinstance(v, Lab)}
        values = {n.name: v for n, v in self.values.items() if not isinstance(v, (Lab, Opaque))}
        views = frozenset(n.name for n, v in self.values.items() if isinstance(v, View))
        return Provenance(
            stands, values, self.kinds, self.sources, self.commutes, tuple(self.layers), params, tuple(self.ties),
            tuple(self.pins), tuple(self.blocks), tuple(self.mixers), self.count, views,
            tuple(self.contractions), tuple(self.bonds), untouched=self.untouched(),
        )  # fmt: skip

    def untouched(self) -> tuple[Untouched, ...]:
        """The parameters that no layer of the graph holds channels with, by the user's layers, and why."""
        found: dict[str, Untouched] = {}
        module = self.capture.module
        held = {id(at(module, path)) for layer in self.layers for path in layer.params.values()}
        frozen = {id(at(module, path)): about for path, about in self.frozen.items()}
        for path, value in module.named_parameters():
            if id(value) not in held:
                reason, node = frozen.get(id(value), ("has no channels of its own", None))
                mine = torch.zeros(self.count, dtype=torch.bool)
                labels = self.elements.get(self.owners.get(id(value), path))
                if labels is not None:
                    mine[labels] = True
                pin = next((p for p in self.pins if bool(mine[p.labels].any())), None) if node is None else None
                name = str(node.target) if node is not None and node.op == "call_module" else layer_name(path)
                where = source_line(node) if node is not None else pin.where if pin else ""
                size = value.size(0) if value.dim() else 1
                found.setdefault(name, Untouched(name, size, pin.reason if pin else reason, where))
        fetched = [(n.op, str(n.target)) for n in module.graph.nodes if n.op in ("call_module", "get_attr")]
        called = tuple(f"{target}." for op, target in fetched if op == "call_module")
        owners = {target.rpartition(".")[0] for op, target in fetched if op == "get_attr"}
        folded = {path for n in module.graph.nodes for path in n.meta.get(FOLDED, ())}
        names: dict[int, tuple[int, list[str]]] = {}
        users = self.capture.model.named_parameters(remove_duplicate=False) if self.capture.model is not None else ()
        for path, value in users:
            own = path.partition(".parametrizations.")[0] + ".weight" if ".parametrizations." in path else path
            names.setdefault(id(value), (value.size(0) if value.dim() else 1, []))[1].append(own)
        for size, paths in names.values():  # a tied weight runs where one of its names does
            if not any(p.startswith(called) or p.rpartition(".")[0] in owners or p in folded for p in paths):
                name = layer_name(paths[0])
                found.setdefault(name, Untouched(name, size, "does not run on the example inputs", ""))
        return tuple(found.values())


_NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # torch takes numpy's names too


def provenance(capture: Capture, whole: bool = False) -> Provenance:
    """Run a captured graph on labels; `whole`: find the bonds too that let blocks of channels leave whole (`wholes`).

    Cost: one pass of integer arithmetic on label tensors, whose spatial axes have stride 0. Raises nothing: whatever
    has no rule is pinned, and the pin says why.
    """
    return _Run(capture, whole).run()
