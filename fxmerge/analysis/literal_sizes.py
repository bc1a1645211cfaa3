"""Literal sizes in a graph (`view(b, 4, 16)`) that a merge makes wrong are recomputed, and the new ones are proved.

The graph is run once more, on the labels that are kept. Each movement op must give exactly the kept labels of its
former output. If it does not, `rules.resize.resized` proposes new literals, with which it must. If these fail too, the
channels that meet at the op must stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.analysis.kept_values import ANY, equal, same, unchanged
from fxmerge.graph import nested
from fxmerge.ir.capture import Capture
from fxmerge.ir.labels import compact, numbers, simplify, thin
from fxmerge.ir.provenance import Lab, Param, Provenance, blocks_left
from fxmerge.rules import movement
from fxmerge.rules.lookup import rule_of, rule_of_target
from fxmerge.rules.resize import IMPLICIT, Call, Resize, resized
from fxmerge.rules.rule import Rule


@dataclass(frozen=True)
class Failure:
    """A node whose sizes cannot be corrected, and the labels that must therefore stay."""

    node: str
    labels: Tensor


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
        self.rigid = captured.recorded.glue if captured.recorded else frozenset()

    def run(self) -> tuple[dict[str, Call], list[Failure]]:
        for node in self.captured.module.graph.nodes:
            if node.op != "output":
                before, after = self.before(node.name), self.step(node)
                self.values[node.name] = after
                if unchanged(before, after) and not self.narrows(before):
                    self.untouched.add(node.name)
        return self.edits, self.failures

    def before(self, name: str) -> Any:
        return Lab(self.facts.labels[name]) if name in self.facts.labels else self.facts.values.get(name)

    def narrows(self, value: Any) -> bool:
        """Is this a raw parameter that loses elements?"""
        known = self.facts.params.get(value.path) if isinstance(value, Param) else None
        return known is not None and known.elements is not None and not bool(self.alive[known.elements].all())

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
        if isinstance(before, Param) or not _labelled(before):
            return before
        expected = self.shrunk(before)
        if kind == "movement":
            return self.movement(node, before, expected)
        self.freeze_scalars(node)
        self.implicit(node)
        if self.rule_name(node) == "setitem":
            self.written(node)
        if not expected:
            self.fail(node)
            return before
        return expected[0]

    def arguments(self, call: fx.Node | Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def value(leaf: Any) -> Any:
            return self.values[self.latest.get(leaf.name, leaf.name)] if isinstance(leaf, fx.Node) else leaf

        return nested.tree(value, tuple(call.args)), nested.tree(value, dict(call.kwargs))

    def query(self, node: fx.Node, before: Any) -> Any:
        """Plain values that the graph computes from sizes are computed again."""
        args, kwargs = self.arguments(node)
        if node.target is getattr and args[1] in ("dtype", "device"):
            return before
        try:
            return movement.run(node.target, *_plain(args, kwargs))
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
            return before

    def freeze_scalars(self, node: fx.Node) -> None:
        """A number computed from a width that narrows (an attention scale) keeps its value."""

        def original(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node) and leaf.name not in self.facts.labels:
                old, new = self.facts.values.get(leaf.name), self.values.get(leaf.name)
                if isinstance(old, (int, float)) and old != new:
                    return old
            return leaf

        args, kwargs = nested.tree(original, tuple(node.args)), nested.tree(original, dict(node.kwargs))
        if (args, kwargs) != (tuple(node.args), dict(node.kwargs)):
            self.edit(node, Call(node.target, args, kwargs))

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
            before = [_shape(self.before(o.name)) for o in operands]
            found = follow(call, before, [_shape(self.values[o.name]) for o in operands], self.blocks(node))
            if found is not None:
                self.edit(node, found)

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
        before, after = _shape(self.before(filters.name)), _shape(self.values[filters.name])
        return (before[0], after[0]) if before is not None and after is not None else (1, 1)

    def rule_name(self, node: fx.Node) -> str:
        return _name(rule_of(node, self.captured.module))

    def movement(self, node: fx.Node, before: Any, expected: list[Any]) -> Any:
        if len(expected) == 1 and unchanged(before, expected[0]) and self.untouched.issuperset(self.latest.values()):
            return before
        args, kwargs = self.arguments(node)
        # sizes inside a module cannot be changed by its call, nor can the user's own code
        fixed = node.op == "call_module" or node.name in self.rigid
        target = self.captured.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        for want in expected:
            if same(self.attempt(node, target, args, kwargs), want):
                return want
        if fixed and node.name in self.facts.made and len(expected) == 1:  # the user's code may follow the width
            return expected[0]
        for want in [] if fixed else expected:
            name = self.rule_name(node)
            shapes = [nested.tree(lambda v: tuple(v.t.shape) if isinstance(v, Lab) else v, v) for v in (before, want)]
            call = Call(node.target, tuple(node.args), dict(node.kwargs))
            was = nested.tree(lambda v: self.facts.values.get(v.name, v) if isinstance(v, fx.Node) else v, call.args)
            now = Call(call.target, args, kwargs)
            about = Resize(shapes[0], shapes[1], lambda at: self.survivors(node, at), Call(call.target, was, {}), now)
            proposal = resized(name, call, about)
            if proposal is not None:
                found = self.attempt(node, proposal.target, *self.arguments(proposal))
                if same(found, want):
                    self.edits[node.name] = proposal
                    return want
        self.fail(node)
        return expected[0] if expected else before

    def attempt(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = "" if isinstance(target, nn.Module) else _name(rule_of_target(target))
        if name == "pad":
            kwargs = {**kwargs, "value": ANY}
            args = args[:3]
        try:
            out = movement.run(target, *_plain(args, kwargs, self.facts, self.alive, name in movement.INDEXING))
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

    def fail(self, node: fx.Node) -> None:
        held = [v.t for v in nested.leaves(self.before(node.name)) if isinstance(v, Lab)]
        for source in self.latest.values():
            held += [v.t for v in nested.leaves(self.before(source)) if isinstance(v, Lab)]
        labels = torch.unique(torch.cat([numbers(t) for t in held]))
        self.failures.append(Failure(node.name, labels[~self.alive[labels]]))


def _name(rule: Rule | None) -> str:
    return "" if rule is None else rule.name


def _shape(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Lab):
        return tuple(value.t.shape)
    return tuple(value.value.shape) if isinstance(value, Param) else None


def _labelled(value: Any) -> bool:
    return any(isinstance(leaf, Lab) for leaf in nested.leaves(value))


def _plain(
    args: tuple[Any, ...], kwargs: dict[str, Any], facts: Provenance | None = None, alive: Tensor | None = None,
    indexing: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    def plain(value: Any) -> Any:
        if isinstance(value, Lab):
            return value.t
        if isinstance(value, Param) and facts is not None and alive is not None:
            known = facts.params.get(value.path)
            if known is not None and known.elements is not None:
                return (compact(known.elements, alive) or [known.elements])[0]
        if isinstance(value, Param):
            return value.value
        if isinstance(value, Tensor) and facts is not None and not indexing:
            return torch.zeros(value.shape, dtype=torch.int64)
        return value

    return nested.tree(plain, args), nested.tree(plain, kwargs)
