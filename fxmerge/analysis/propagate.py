"""Provenance: one run of the graph on labels shows which channel goes where.

Every channel that a parameter creates gets a label. The graph is interpreted on label tensors, which have the shapes
of the activations, with one rule for each op (`rules.table.RULES`). The rules record facts: ties (labels that are
dropped together), pins (labels that must stay, with the reason and the user's source line), blocks (rows that must lose
equally many).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.analysis.constants import labelled, makers, passes_factor
from fxmerge.analysis.uniform import is_uniform, width_of
from fxmerge.analysis.untouched import untouched
from fxmerge.errors import source_line
from fxmerge.graph import nested
from fxmerge.graph.ops import by_name, in_place, overload_name
from fxmerge.ir.capture import Capture
from fxmerge.ir.labels import fixed, numbers, simplify
from fxmerge.ir.provenance import Kind, Lab, Layer, Param, ParamLabels, Pin, Provenance, Turned, View
from fxmerge.rules import movement
from fxmerge.rules.call_names import call_name
from fxmerge.rules.context import RuleContext
from fxmerge.rules.facts import FactsBuilder
from fxmerge.rules.lookup import attributes_of, name_of, rule_of, takes_params
from fxmerge.rules.products import STACKED
from fxmerge.rules.rule import Answer, AsKind, Rule, Unknown
from fxmerge.weights.by_path import at


def provenance(capture: Capture, whole: bool = False) -> Provenance:
    """Run a captured graph on labels.

    whole: find the bonds too, by which whole blocks of channels may leave (see `analysis.whole_blocks`)
    Cost: one pass of integer arithmetic on label tensors, whose spatial axes have stride 0. Raises nothing: channels
    that meet an op without a rule are pinned, and the pin names the reason.
    """
    made: dict[str, tuple[int, ...]] = {}
    while True:
        interpreter = _Interpreter(capture, whole, made)
        facts = interpreter.run()
        wanted = makers(interpreter.facts.wanted, capture.module, interpreter.values)
        if not set(wanted) - set(made):
            return facts
        made |= {name: axes for name, axes in wanted.items() if name not in made}


class Opaque:
    """The value of an unknown op that returned something other than one tensor. No rule takes it."""


class _Interpreter:
    """Walks the graph once, with one rule for each node."""

    def __init__(self, capture: Capture, whole: bool, made: Mapping[str, tuple[int, ...]]) -> None:
        self.capture, self.facts, self.made = capture, FactsBuilder(whole), made
        self.uniform: set[str] = set()  # nodes whose values are the same for all channels
        self.factors: set[str] = set()  # nodes that make constants other than zeros, which no factor passes
        self.inputs = iter(capture.inputs)
        self.kinds: dict[str, Kind] = {}
        self.commutes: dict[str, bool] = {}
        self.linear: dict[str, bool] = {}
        self.rules: dict[str, str] = {}
        self.calls: dict[tuple[Any, ...], str] = {}  # a call without its activations -> the first node that makes it
        self.same_call: dict[str, str] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.owners: dict[int, str] = {}  # identity of a parameter -> the one path that it is known by
        self.values: dict[fx.Node, Any] = {}
        self.renewed: dict[fx.Node, fx.Node] = {}  # a node -> the node that last updated its value in place

    def run(self) -> Provenance:
        held = self.capture.recorded.held if self.capture.recorded else {}
        for node in self.capture.module.graph.nodes:
            self.sources[node.name] = tuple(self.latest(n).name for n in node.all_input_nodes)
            taken = [(self.latest(n).name, self.values[self.latest(n)]) for n in node.all_input_nodes]
            mixers = len(self.facts.mixers)
            value, self.kinds[node.name] = self.step(node)
            self.hold_widths(node, value, taken, mixers)
            if node.name in self.made:
                self.uniform.add(node.name)
                if not passes_factor(node, value, self.capture.module):
                    self.factors.add(node.name)
                value, self.kinds[node.name] = labelled(self.facts, node, value, self.made[node.name]), "movement"
            self.values[node] = value
            self.same_call[node.name] = self.calls.setdefault(self.signature(node), node.name)
            self.facts.node_of.setdefault(id(value), node)
            if node.name in held:
                self.hold([leaf for leaf in nested.leaves(value) if isinstance(leaf, Lab)], node, held[node.name])
        return self.found()

    def hold_widths(self, node: fx.Node, value: Any, taken: list[tuple[str, Any]], mixers: int) -> None:
        """Pin channels of which nothing but their number is left, such as those of `torch.ones_like(x).sum(-1)`."""
        kind, mixed = self.kinds[node.name], [labels for _, labels in self.facts.mixers[mixers:]]
        for labels in width_of(kind, value, taken, self.uniform, mixed):
            why = "runs over values that are the same for all channels, so its result would follow the width"
            self.facts.pin(node, labels, f"{call_name(node)} {why}")
        if is_uniform(node, self.rules.get(node.name, ""), kind, taken, self.uniform):
            self.uniform.add(node.name)

    def latest(self, node: fx.Node) -> fx.Node:
        while node in self.renewed:
            node = self.renewed[node]
        return node

    def signature(self, node: fx.Node) -> tuple[Any, ...]:
        """What a node calls, with its parameters and constants, but whatever activations."""
        if node.op not in ("call_module", "call_function", "call_method"):
            return (node.name,)

        def known(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            value = self.values[leaf]
            return f"%{value.path}" if isinstance(value, Param) else "%" if leaf.op != "get_attr" else f"%{leaf.target}"

        return node.op, node.target, *(repr(nested.tree(known, v)) for v in (tuple(node.args), dict(node.kwargs)))

    def param(self, path: str, value: Tensor) -> Param:
        """A tensor that several paths share is one parameter, known by the path that came first."""
        return Param(self.owners.setdefault(id(value), path), value)

    def step(self, node: fx.Node) -> tuple[Any, Kind]:
        """The value of a node, and its kind."""
        if node.op == "placeholder":
            given, shape = next(self.inputs), self.capture.shapes.get(node.name)
            if shape is not None:
                return Lab(fixed(shape)), "input"
            return nested.tree(lambda v: Lab(fixed(v.shape)) if isinstance(v, Tensor) else v, given), "input"
        if node.op == "get_attr":
            value = at(self.capture.module, str(node.target))
            known = isinstance(value, Tensor) and not node.meta.get("constant")
            return self.param(str(node.target), value) if known else value, "query"

        if name_of(rule_of(node, self.capture.module)) not in STACKED:
            self.untwist(node)

        def operand(value: Any) -> Any:
            return self.values[self.latest(value)] if isinstance(value, fx.Node) else value

        args, kwargs = nested.tree(operand, list(node.args)), nested.tree(operand, dict(node.kwargs))
        if node.op == "output":
            for source in node.all_input_nodes:
                self.hold([operand(source)], source, "is the model's output")
            return None, "output"
        return self.call(node, args, kwargs)

    def untwist(self, node: fx.Node) -> None:
        """Labels the elements of transposed stacks that a node takes."""
        for source in node.all_input_nodes:
            value = self.values[self.latest(source)]
            if isinstance(value, Turned):
                elements = self.facts.labelled_elements(value.param)
                self.values[self.latest(source)] = View(simplify(elements.transpose(1, 2)), value.param)

    def call(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, Kind]:
        """The value and kind of a call: by its rule, or with everything that it touches pinned."""
        operands = nested.leaves([*args, *kwargs.values()])
        is_module = node.op == "call_module"
        target: Any = self.capture.module.get_submodule(str(node.target)) if is_module else node.target
        if not is_module and not any(isinstance(leaf, (Lab, Param, Turned, Opaque)) for leaf in operands):
            return movement.run(target, tuple(args), kwargs), "query"  # a plain value: computed as it is
        rule, why = rule_of(node, self.capture.module), "has no rule"
        if is_module and (target._forward_hooks or target._forward_pre_hooks):
            rule, why = None, "has forward hooks"
        elif is_module and rule is None:
            why = f"is a {type(target).__name__}, which has no rule"
        elif any(isinstance(leaf, Opaque) for leaf in operands):
            why = why if rule is None else "takes the result of a call that cannot be followed"
            rule = None
        sizes, kind = self.facts.sizes(), rule.kind if rule is not None else "unknown"
        answer = self.apply(rule, node, target, args, kwargs) if rule is not None else Unknown(why)
        if isinstance(answer, AsKind):
            kind, answer = answer.kind, answer.answer
        if isinstance(answer, Unknown):
            self.facts.take_back(sizes)
            kind, answer = "unknown", self.unknown(node, target, args, operands, answer.reason)
        elif isinstance(answer, View) and kind != "movement":
            answer = Lab(answer.t)
        if in_place(node, target) and node.args and isinstance(node.args[0], fx.Node):
            self.renewed[self.latest(node.args[0])] = node
        return answer, kind

    def apply(self, rule: Rule, node: fx.Node, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Answer:
        """The answer of a rule, whose arguments are named as in the op's functional form."""
        if rule.kind != "movement":
            if overload_name(target) is not None:
                args, kwargs = by_name(target, args, kwargs, dict(inspect.signature(rule.apply).parameters))
            if node.op != "call_module":
                kwargs = {_NUMPY.get(name, name): value for name, value in kwargs.items()}
        for attribute in attributes_of(target) if node.op == "call_module" else ():
            value = getattr(target, attribute)
            is_tensor = isinstance(value, Tensor)
            kwargs[attribute] = self.param(f"{node.target}.{attribute}", value) if is_tensor else value
        if node.op == "call_module" and takes_params(target):
            own = target.named_parameters(recurse=False, remove_duplicate=False)
            kwargs["params"] = {name: self.param(f"{node.target}.{name}", value) for name, value in own}
        if getattr(target, "padding_mode", "zeros") != "zeros":
            kwargs.pop("padding", None)
        ctx = RuleContext(self.facts, self.capture, node, rule.name, target)
        try:
            answer = rule.apply(ctx, *args, **kwargs)
        except (TypeError, IndexError, RuntimeError, ValueError) as error:
            if any(isinstance(leaf, Lab) and not leaf.t.numel() for leaf in nested.leaves([*args, *kwargs.values()])):
                return Unknown("takes no row of these example inputs; give inputs of which it does")
            return Unknown(f"is called in a way that its rule does not know ({error})")
        if not isinstance(answer, Unknown):
            self.rules[node.name] = rule.name
            for found, passes in ((self.commutes, rule.commutes), (self.linear, rule.linear)):
                found[node.name] = bool(passes(ctx, *args, **kwargs) if callable(passes) else passes)
        return answer

    def unknown(self, node: fx.Node, target: Any, args: list[Any], operands: list[Any], reason: str) -> Lab | Opaque:
        """Pin everything that a call touches; its value holds no channels."""
        name, owned = call_name(node), []
        if isinstance(target, nn.Module):
            owned = [Param(f"{node.target}.{n}", v) for n, v in [*target.named_parameters(), *target.named_buffers()]]
        self.hold(operands, node, f"{name} {reason}", f"is used by {name}, which {reason}")
        self.hold(owned, node, "", f"belongs to {name}, which {reason}")
        shape = self.capture.shapes.get(node.name)
        if shape is None and in_place(node, target) and args and isinstance(args[0], (Lab, Tensor)):
            shape = tuple(args[0].t.shape if isinstance(args[0], Lab) else args[0].shape)
        return Lab(fixed(shape)) if shape is not None else Opaque()

    def hold(self, values: list[Any], node: fx.Node, reason: str, of_param: str = "") -> None:
        """Pin the channels of activations, and freeze parameters."""
        for leaf in nested.leaves(values):
            if isinstance(leaf, Lab):
                self.facts.pin(node, leaf.t, reason)
            elif isinstance(leaf, (Param, Turned)):
                held = leaf.param if isinstance(leaf, Turned) else leaf
                self.facts.freeze(node, held, of_param or reason)

    def params(self) -> dict[str, ParamLabels]:
        """The labels of each parameter; those of frozen ones are pinned."""
        facts, found = self.facts, {}
        axes_of: dict[str, dict[int, Tensor]] = {}
        for (path, axis), labels in facts.axes.items():
            axes_of.setdefault(path, {})[axis] = labels
        for path in sorted({*axes_of, *facts.elements}):
            axes, elements = axes_of.get(path, {}), facts.elements.get(path)
            found[path] = ParamLabels(path, axes, elements, facts.groups.get(path, 1))
            reason, node = facts.frozen.get(path, ("", None))
            if axes and elements is not None:
                reason = f"{path} is used both as a weight and element by element"
            if reason:
                everything = torch.cat(
                    [t.flatten() for t in (*axes.values(), *([] if elements is None else [elements]))]
                )
                where = source_line(node) if node is not None else ""
                facts.pins.append(Pin(numbers(everything), reason, node.name if node else "", where))
        return found

    def layers(self) -> tuple[Layer, ...]:
        """The layers. A call in the user's own code, which cannot be edited, is given no bias."""
        recorded = self.capture.recorded
        calls = {n.name for n in self.capture.module.graph.nodes if n.op != "call_module"}
        own = calls & recorded.glue if recorded is not None else set[str]()

        def known(layer: Layer) -> Layer:
            return replace(layer, bare=True) if layer.node in own and "bias" not in layer.params else layer

        return tuple(map(known, self.facts.layers))

    def found(self) -> Provenance:
        self.facts.tie_unused_rows()
        facts, params = self.facts, self.params()
        return Provenance(
            labels={n.name: v.t for n, v in self.values.items() if isinstance(v, Lab)},
            values={n.name: v for n, v in self.values.items() if not isinstance(v, (Lab, Opaque))},
            kinds=self.kinds,
            sources=self.sources,
            commutes=self.commutes,
            linear=self.linear,
            rules=self.rules,
            same_call=self.same_call,
            layers=self.layers(),
            params=params,
            ties=tuple(facts.ties),
            pins=tuple(facts.pins),
            blocks=tuple(facts.blocks),
            mixers=tuple(facts.mixers),
            label_count=facts.label_count,
            made={name: name in self.factors for name in self.made},
            views=frozenset(n.name for n, v in self.values.items() if isinstance(v, View)),
            contractions=tuple(facts.contractions),
            grids=tuple(facts.grids),
            stacks=tuple(facts.stacks),
            bonds=tuple(facts.bonds),
            untouched=untouched(self.capture, facts, self.owners),
        )


_NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # torch takes numpy's names too
