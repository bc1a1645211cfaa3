"""Literal sizes in a graph (`view(b, 4, 16)`) that a merge makes wrong are recomputed, and the new ones are proved.

The graph is run once more, on the labels that are kept. Each movement op must give exactly the kept labels of its
former output. If it does not, `rules.resize.resized` proposes new literals, with which it must. If these fail too, the
channels that meet at the op must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.analysis.kept_values import (
    ANY,
    equal,
    labelled,
    labels_of,
    narrowed,
    narrows,
    plain,
    same,
    shape_of,
    unchanged,
)
from fxmerge.analysis.original_values import Originals, StuckError, computed, sources
from fxmerge.graph import nested
from fxmerge.graph.ops import called
from fxmerge.ir.capture import Capture
from fxmerge.ir.labels import compact, numbers, simplify, thin
from fxmerge.ir.provenance import Lab, Param, Provenance, blocks_left
from fxmerge.rules import movement
from fxmerge.rules.lookup import name_of, rule_of, rule_of_target
from fxmerge.rules.recurrent import too_narrow
from fxmerge.rules.resize import IMPLICIT, Call, Resize, resized


@dataclass(frozen=True)
class Failure:
    """A node whose sizes cannot be corrected, and the labels that must therefore stay.

    reason: a clause for reports
    """

    node: str
    labels: Tensor
    reason: str


def recompute(captured: Capture, facts: Provenance, alive: Tensor) -> tuple[dict[str, Call], list[Failure]]:
    """(node -> its new call, failures) for a graph in which labels with `alive[label]` False are dropped."""
    return _Check(captured, facts, alive).run()


class _Check:
    def __init__(self, captured: Capture, facts: Provenance, alive: Tensor) -> None:
        self.captured, self.facts, self.alive = captured, facts, alive
        self.values: dict[str, Any] = {}
        self.edits: dict[str, Call] = {}
        self.compacted: dict[
            int, tuple[Tensor, list[Lab]]
        ] = {}  # identity of labels -> the labels, and what is kept of them
        self.untouched: set[str] = set()  # nodes whose value has not changed
        self.failures: list[Failure] = []
        self.latest: dict[str, str] = {}
        self.originals = Originals(self.before, self.values.__getitem__, self.is_changed)
        self.rigid = captured.recorded.glue if captured.recorded else frozenset()

    def run(self) -> tuple[dict[str, Call], list[Failure]]:
        for node in self.captured.module.graph.nodes:
            if node.op != "output":
                before, after = self.before(node.name), self.step(node)
                self.values[node.name] = after
                if unchanged(before, after) and not narrows(before, self.facts, self.alive):
                    self.untouched.add(node.name)
        return self.edits, self.failures

    def before(self, name: str) -> Any:
        return Lab(self.facts.labels[name]) if name in self.facts.labels else self.facts.values.get(name)

    def is_changed(self, name: str) -> bool:
        return name not in self.untouched

    def shrunk(self, value: Any) -> list[Any]:
        """What is kept of a node's value: every rectangle that the kept labels can fill."""
        if isinstance(value, Lab):
            known = self.compacted.get(id(value.t))  # many nodes hold the label tensor of their operand
            if known is None:
                known = self.compacted[id(value.t)] = value.t, [Lab(t) for t in compact(value.t, self.alive)]
            return list(known[1])
        if isinstance(value, tuple):
            parts = [self.shrunk(v) for v in value]
            made = type(value) if hasattr(value, "_fields") else lambda *several: several
            return [made(*(p[0] for p in parts))] if all(parts) else []
        if isinstance(value, list):
            return [list(found) for found in self.shrunk(tuple(value))]
        if isinstance(value, dict):
            return [dict(zip(value, found, strict=True)) for found in self.shrunk(tuple(value.values()))]
        return [value]

    def step(self, node: fx.Node) -> Any:
        # the value of an operand that was updated in place is that of the update
        self.latest = dict(zip((n.name for n in node.all_input_nodes), self.facts.sources[node.name], strict=True))
        before = self.before(node.name)
        kind = self.facts.kinds[node.name]
        if kind == "query" and node.op not in ("get_attr", "placeholder"):
            return self.query(node, before)
        if isinstance(before, Param) or not labelled(before):
            if kind == "unknown":  # of several tensors, say; it may take a size as a value
                self.valued(node, self.originals.of_operands)
            return before
        expected = self.shrunk(before)
        if kind == "movement":
            return self.movement(node, before, expected)
        self.valued(node, self.originals.of_operands)
        self.implicit(node)
        self.constructible(node)
        if self.rule_name(node) == "setitem":
            self.written(node)
        if not expected:
            self.fail(node)
            return before
        return self.packed(before, expected) if len(expected) > 1 else expected[0]

    def packed(self, before: Any, expected: list[Any]) -> Any:
        """What is left of an activation, of several rectangles: the one of an operand that holds the same channels."""
        for source in self.latest.values():
            operand, now = self.before(source), self.values[source]
            if isinstance(operand, Lab) and isinstance(before, Lab) and same(operand, before):
                return next((e for e in expected if same(e, now)), expected[0])
        return expected[0]

    def arguments(self, call: fx.Node | Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def value(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return self.values[self.latest.get(leaf.name, leaf.name)]
            return self.originals.evaluated(leaf)

        return nested.tree(value, tuple(call.args)), nested.tree(value, dict(call.kwargs))

    def query(self, node: fx.Node, before: Any) -> Any:
        """Plain values that the graph computes from sizes are computed again."""
        if self.untouched.issuperset(self.latest.values()):
            return before
        if node.target is getattr and node.args[1] in ("dtype", "device"):
            return before
        call = self.valued(node, self.originals.of_query)
        args, kwargs = nested.tree(lambda v: narrowed(v, self.facts, self.alive), self.arguments(call))
        if args and type(args[0]) is tuple and isinstance(node.target, str):  # a method of a shape
            args = (torch.Size(args[0]), *args[1:])
        try:
            return computed(node.target, args, kwargs)
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
            self.fail(node, f"{node.name} is computed from a width, and cannot be computed from another")
            return before

    def valued(self, node: fx.Node, original: Callable[[fx.Node], Call]) -> fx.Node | Call:
        """The call of a node with values that are as before the merge (an attention scale)."""
        try:
            call = original(node)
        except StuckError:
            self.fail(node, f"{node.name} takes a value computed from its width, which would change with it")
            return node
        if (call.args, call.kwargs) == (tuple(node.args), dict(node.kwargs)):
            return node
        self.edit(node, call)
        return call

    def edit(self, node: fx.Node, call: Call) -> None:
        if node.name in self.rigid:
            self.fail(node)
        else:
            self.edits[node.name] = call

    def implicit(self, node: fx.Node) -> None:
        """An op whose result depends on a width gets arguments that keep its result."""
        if node.op != "call_function" or self.facts.kinds[node.name] == "unknown":
            return
        follow = IMPLICIT.get(self.rule_name(node))
        if follow is not None:
            call = self.edits.get(node.name, Call(node.target, tuple(node.args), dict(node.kwargs)))
            operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
            before = [shape_of(self.before(o.name)) for o in operands]
            found = follow(call, before, [shape_of(self.values[o.name]) for o in operands], self.blocks(node))
            if found is not None:
                self.edit(node, found)

    def constructible(self, node: fx.Node) -> None:
        """Fails for sizes that torch refuses."""
        for layer in self.facts.layers:
            if layer.node == node.name and (held := too_narrow(layer, self.alive)).numel():
                self.failures.append(Failure(node.name, held, "torch does not construct a layer of this size"))

    def written(self, node: fx.Node) -> None:
        """x[index] = value: a literal index is corrected as in x[index], and proved by what it then selects."""
        target, index = node.args[:2]
        assert isinstance(target, fx.Node)
        whole = self.before(self.latest[target.name])
        literal = index if isinstance(index, tuple) else (index,)
        if not isinstance(whole, Lab) or not all(i is None or i is ... or isinstance(i, (int, slice)) for i in literal):
            return
        kept, wanted = self.shrunk(whole), self.shrunk(Lab(whole.t[index]))  # type: ignore[index]
        found = Call(node.target, tuple(node.args), dict(node.kwargs))
        about = Resize(tuple(whole.t[index].shape), (), lambda at: self.survivors(node, at), found, found)  # type: ignore[index]
        for call in (found, resized("getitem", Call(node.target, found.args[:2], {}), about)):
            if call is not None and kept and any(equal(kept[0].t[call.args[1]], want.t) for want in wanted):
                if call is not found:
                    self.edit(node, Call(node.target, (target, call.args[1], node.args[2]), found.kwargs))
                return
        self.fail(node)

    def blocks(self, node: fx.Node) -> tuple[int, int]:
        """(groups of the layer at a node, how many of them are left)."""
        layers = [layer for layer in self.facts.layers if layer.node == node.name and layer.groups > 1]
        if layers:
            return layers[0].groups, blocks_left(layers[0], self.alive)
        filters = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")  # computed, one for each channel
        if self.rule_name(node) not in ("conv", "conv_transpose") or not isinstance(filters, fx.Node):
            return 1, 1
        before, after = shape_of(self.before(filters.name)), shape_of(self.values[filters.name])
        return (before[0], after[0]) if before is not None and after is not None else (1, 1)

    def rule_name(self, node: fx.Node) -> str:
        return name_of(rule_of(node, self.captured.module))

    def movement(self, node: fx.Node, before: Any, expected: list[Any]) -> Any:
        if len(expected) == 1 and unchanged(before, expected[0]) and self.untouched.issuperset(self.latest.values()):
            return before
        args, kwargs = self.arguments(node)
        # sizes inside a module cannot be changed by its call, nor can the user's own code
        fixed = node.op == "call_module" or node.name in self.rigid
        for want in expected:
            if same(self.attempt(node, called(self.captured.module, node), args, kwargs), want):
                return want
        if fixed and node.name in self.facts.made and len(expected) == 1:  # the user's code may follow the width
            return expected[0]
        for want in [] if fixed else expected:
            shapes = [nested.tree(lambda v: tuple(v.t.shape) if isinstance(v, Lab) else v, v) for v in (before, want)]
            call = Call(node.target, tuple(node.args), dict(node.kwargs))
            was = nested.tree(lambda v: self.facts.values.get(v.name, v) if isinstance(v, fx.Node) else v, call.args)
            now = Call(call.target, args, kwargs)
            about = Resize(shapes[0], shapes[1], lambda at: self.survivors(node, at), Call(call.target, was, {}), now)
            proposal = resized(self.rule_name(node), call, about)
            if proposal is not None:
                found = self.attempt(node, proposal.target, *self.arguments(proposal))
                if same(found, want):
                    self.edits[node.name] = proposal
                    return want
        self.fail(node)
        return expected[0] if expected else before

    def attempt(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = "" if isinstance(target, nn.Module) else name_of(rule_of_target(target))
        if name == "pad":
            kwargs = {**kwargs, "value": ANY}
            args = args[:3]
        try:
            out = movement.run(target, *plain(args, kwargs, self.facts, self.alive, name in movement.INDEXING))
        except (TypeError, RuntimeError, ValueError, IndexError):
            return None
        if node.name in self.facts.made and isinstance(out, Tensor):  # a constant, which is equal along its channels
            return Lab(torch.tensor(ANY).expand(out.shape))
        return nested.tree(
            lambda v: Lab(simplify(v)) if isinstance(v, Tensor) else v, tuple(out) if isinstance(out, list) else out
        )

    def survivors(self, node: fx.Node, axis: int) -> Tensor:
        """Which places along an axis of the first operand are kept, (size,)."""
        source = node.args[0]
        labels = self.facts.labels.get(self.latest[source.name]) if isinstance(source, fx.Node) else None
        if labels is None:
            return torch.ones(0, dtype=torch.bool)
        others = [a for a in range(labels.dim()) if a != axis % labels.dim()]
        mask = self.alive[thin(labels)]
        return (mask.amax(others) if others else mask).expand(labels.size(axis))

    def fail(self, node: fx.Node, reason: str = "") -> None:
        """Holds the channels that meet at a node; where none of them leave, those from whose sizes it computes."""
        values = [self.before(name) for name in (node.name, *self.latest.values())]
        held = [v.t for value in values for v in nested.leaves(value) if isinstance(v, Lab)]
        around = [n for source in node.all_input_nodes for n in sources(source, self.before)]
        labels = self.leaving([*held, *self.of_params(node.all_input_nodes)])
        if not labels.numel():
            sized = [v.t for n in around for v in nested.leaves(self.before(n.name)) if isinstance(v, Lab)]
            labels = self.leaving([*sized, *self.of_params(around)])
        self.failures.append(Failure(node.name, labels, reason or f"the sizes at {node.name} cannot follow"))

    def leaving(self, held: list[Tensor]) -> Tensor:
        """Those of some labels that are dropped, without repetition."""
        labels = torch.unique(torch.cat([numbers(t) for t in (*held, torch.zeros(1, dtype=torch.int64))]))
        found: Tensor = labels[~self.alive[labels]]
        return found

    def of_params(self, nodes: Iterable[fx.Node]) -> list[Tensor]:
        """The labels of the parameters among some nodes."""
        paths = {str(n.target) for n in nodes if n.op == "get_attr"} & set(self.facts.params)
        return [t for path in sorted(paths) for t in labels_of(self.facts.params[path])]
