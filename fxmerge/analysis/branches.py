"""Residual branches: the parts f of adds `x + f(x)` that can be dropped as a whole.

Let an add have the operands a and b, both of the shape of the sum. b is the end of a branch if it depends on an
activation that a is or depends on. The branch is what nothing reads any more once the add does not read b. Masks,
rotary tables, or a norm that another branch reads too, are thus used by the branch without being part of it. A branch
has at least one layer that mixes channels, and all such layers that it consists of: where one of them is read from
outside (an output, a key that a later layer reuses), the branch has no single exit, and is not found.

An operand that a reads alone, such as the convolution of a shortcut, is a branch of the same add.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile

from torch import fx

from fxmerge.errors import source_line
from fxmerge.graph.ops import updates
from fxmerge.ir.branches import Branch
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.rules.call_names import call_name
from fxmerge.rules.lookup import rule_of


def branches(captured: Capture, facts: Provenance) -> tuple[tuple[Branch, ...], str]:
    """(the residual branches in the order of their adds, why none can be dropped or "")."""
    if captured.recorded is not None:
        return (), "only parts of the model could be traced, and its own code cannot be edited"
    if why := _updated(captured, facts):
        return (), why
    found = list(_Walk(captured, facts).found())
    named = _names([layers for _, layers in found], [b.add for b, _ in found])
    whole = tuple(
        Branch(name=name, add=b.add, end=b.end, nodes=b.nodes, layers=b.layers)
        for name, (b, _) in zip(named, found, strict=True)
    )
    return whole, "" if whole else "the model has no residual branch that could be dropped"


def _updated(captured: Capture, facts: Provenance) -> str:
    """Why nodes cannot be removed: a value is updated in place, and then read by its old name or through a view."""
    for node in captured.module.graph.nodes:
        if set(facts.sources.get(node.name, ())) - {source.name for source in node.all_input_nodes}:
            return f"a tensor is updated in place before {call_name(node)} reads it [{source_line(node)}]"
        if updates(captured.module, node) and node.args and isinstance(node.args[0], fx.Node):
            view = node.args[0]
            moved = facts.kinds.get(view.name) == "movement"
            if moved and any(len(source.users) > 1 for source in view.all_input_nodes):
                return f"{call_name(node)} updates a view of a tensor in place [{source_line(node)}]"
    return ""


class _Walk:
    def __init__(self, captured: Capture, facts: Provenance) -> None:
        self.captured, self.nodes = captured, list(captured.module.graph.nodes)
        self.at = {node: number for number, node in enumerate(self.nodes)}
        self.layers: dict[str, list[Layer]] = {}
        for layer in facts.layers:
            self.layers.setdefault(layer.node, []).append(layer)
        self.above: dict[fx.Node, int] = {}  # a node and the nodes that it depends on, as bits
        self.fed: dict[fx.Node, int] = {}  # the activations among them on whose values it depends
        for number, node in enumerate(self.nodes):
            above, fed = 1 << number, 0
            for source in node.all_input_nodes:
                above |= self.above[source]
                fed |= self.fed[source]
            kind, dtype = facts.kinds.get(node.name), captured.dtypes.get(node.name)
            own = 1 << number if dtype is not None and dtype.is_floating_point else 0
            self.above[node], self.fed[node] = above, 0 if kind == "query" else fed | own

    def found(self) -> Iterator[tuple[Branch, Sequence[str]]]:
        """The branches, still without names, and the layers by which each is named."""
        for add in self.nodes:
            if not self._is_add(add):
                continue
            one, other = add.all_input_nodes
            for kept, end in ((other, one), (one, other)):
                inside = self._dead(add, kept, end)
                mixing = [n for n in inside if any(layer.reads is not None for layer in self.layers.get(n.name, ()))]
                if not mixing or not self.fed[end] & self.fed[kept]:
                    continue
                if self._carries(end, inside) or not self._whole(kept, end, inside):
                    continue
                layers = dict.fromkeys(layer.module for n in inside for layer in self.layers.get(n.name, ()))
                branch = Branch(
                    name="",
                    add=add.name,
                    end=end.name,
                    nodes=tuple(n.name for n in inside),
                    layers=tuple(layers),
                )
                named = dict.fromkeys(la.module for n in mixing for la in self.layers[n.name] if la.reads is not None)
                yield branch, tuple(named)

    def _is_add(self, node: fx.Node) -> bool:
        """Whether a node adds two activations of one shape."""
        if node.op == "call_module" or len(node.all_input_nodes) != 2 or len(node.args) + len(node.kwargs) != 2:
            return False
        rule, shapes = rule_of(node, self.captured.module), self.captured.shapes
        alike = {shapes.get(n.name, ()) for n in (node, *node.all_input_nodes)}
        dtype = self.captured.dtypes.get(node.name)
        is_float = dtype is not None and dtype.is_floating_point
        return rule is not None and rule.name == "add" and is_float and len(alike) == 1 and alike != {()}

    def _dead(self, add: fx.Node, kept: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes that nothing reads if the add does not read `end`, in execution order."""
        if set(end.users) != {add} or end.op in ("placeholder", "output"):
            return []
        found, possible = {end}, self.above[end] & ~self.above[kept]
        for node in reversed(self.nodes[: self.at[end]]):
            called = node.op not in ("placeholder", "output")
            if possible >> self.at[node] & 1 and called and node.users and all(user in found for user in node.users):
                found.add(node)
        return sorted(found, key=self.at.__getitem__)

    def _carries(self, end: fx.Node, inside: Sequence[fx.Node]) -> bool:
        """Whether the end is a sum that a value from outside is a term of: then it is a stream, and not a branch."""
        terms = [end]
        while terms:
            node = terms.pop()
            if node not in inside:
                return True
            terms += node.all_input_nodes if self._is_add(node) else []
        return False

    def _whole(self, kept: fx.Node, end: fx.Node, inside: Sequence[fx.Node]) -> bool:
        """Whether all layers on the way from what `kept` depends on to the end are inside, and mix channels only there.

        Layers without channels to mix, such as a norm, may be shared with other branches.
        """
        between, entered = self.above[end] & ~self.above[kept], self.fed[kept]
        held = set(inside)
        return not any(
            between >> self.at[node] & 1
            and self.fed[node] & entered
            and node not in held
            and any(layer.reads is not None for layer in self.layers.get(node.name, ()))
            for node in self.nodes[: self.at[end]]
        )


def _names(layers: Sequence[Sequence[str]], adds: Sequence[str]) -> list[str]:
    """A name for each branch: the module that its layers alone have in common, or else its first and last layer."""
    short = [_common([name.split(".") for name in own]) for own in layers]
    around = {".".join(name.split(".")[:n]) for name in short for n in range(name.count(".") + 1)}
    count = Counter(short)
    alone = [count[name] == 1 and name not in around for name in short]
    long = [name if only else _ends(own) for name, only, own in zip(short, alone, layers, strict=True)]
    again = Counter(long)
    return [name if again[name] == 1 else f"{name} at {add}" for name, add in zip(long, adds, strict=True)]


def _common(paths: Sequence[Sequence[str]]) -> str:
    """The longest path that all of these paths begin with."""
    same = (set(parts) for parts in zip(*paths, strict=False))
    return ".".join(next(iter(parts)) for parts in takewhile(lambda parts: len(parts) == 1, same))


def _ends(layers: Sequence[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
