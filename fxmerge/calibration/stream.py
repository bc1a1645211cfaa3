"""One graph that is run node by node, on all batches before the next node runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxmerge.calibration.live import ends, last_readers
from fxmerge.calibration.sample_run import SampleRun
from fxmerge.calibration.tail import LARGE, Recomputed
from fxmerge.calibration.waists import WIDE, Between
from fxmerge.graph.eval_mode import of_the_model
from fxmerge.graph.nested import tree
from fxmerge.graph.ops import tensors
from fxmerge.weights.by_path import at

Values = Sequence[Any]  # of a node, by batch


class Stream:
    """One graph of a paired run, and the values of its nodes that are still needed."""

    def __init__(
        self,
        module: fx.GraphModule,
        batches: Sequence[Sequence[Any]],
        tail: frozenset[str] = frozenset(),
        between: Between | None = None,
    ) -> None:
        """tail, between: the nodes whose values may be computed again"""
        self.module, self.batches, self.tail, self.between = module, batches, tail, between or Between()
        self.waist = 0  # elements of the last waist's values
        self.values: dict[str, Values] = {}
        self.nodes = list(module.graph.nodes)
        self.named = {n.name: n for n in self.nodes}
        self.placeholders = [n.name for n in self.nodes if n.op == "placeholder"]
        self.order = {node.name: number for number, node in enumerate(self.nodes)}
        self.last = last_readers(self.nodes)  # node -> the last node that reads it, or what is computed from it again
        first = batches[0] if batches else None
        self.ends = first.ends if isinstance(first, SampleRun) else ()
        late = [*self.ends, *(s.name for n in self.nodes if n.name in tail for s in n.all_input_nodes)]
        self.last |= dict.fromkeys(late, self.nodes[-1].name)
        self.expires = ends(self.last)  # node -> the nodes that it is the last to read

    def every(self, node: fx.Node) -> Values:
        """The values of a node for all batches."""
        count = len(self.batches)
        known = (self.tail, self.between.waists, self.between.cheap, self.between.costly)
        if torch.is_grad_enabled() or not count or not any(node.name in names for names in known):
            return [self.call(node, number) for number in range(count)]
        first = self.call(node, 0)
        elements = sum(t.numel() for t in tensors(first)) * count
        if node.name in self.between.waists:
            self.waist = elements
        if self._again(node.name, elements):
            for source in node.all_input_nodes if node.name in self.last else ():
                self._hold(source.name, self.last[node.name])
            return Recomputed(lambda number: self.call(node, number), range(count))
        return [first, *(self.call(node, number) for number in range(1, count))]

    def _again(self, name: str, elements: int) -> bool:
        """Whether values with so many elements together are computed again when they are read."""
        if name in self.tail:
            return elements > LARGE
        return elements > WIDE and (
            name in self.between.cheap or (name in self.between.costly and elements > self.waist)
        )

    def call(self, node: fx.Node, number: int, given: Mapping[str, Any] | None = None) -> Any:
        """The value of a node for one batch; `given` holds values of its operands that replace the stored ones."""
        run = self.batches[number]
        if isinstance(run, SampleRun):
            if node.name in run.idle:
                return run.value(node.name)
            if node.op == "output":
                return tuple(self.values[name][number] for name in self.ends)
        if node.op == "placeholder":
            return self.batches[number][self.placeholders.index(node.name)]
        if node.op == "get_attr":
            return at(self.module, str(node.target))

        def operand(source: fx.Node) -> Any:
            if given is not None and source.name in given:
                return given[source.name]
            if source.name not in self.values:  # a parameter that was added during the run
                return at(self.module, str(source.target))
            return self.values[source.name][number]

        literals = run.literals.get(node.name) if isinstance(run, SampleRun) else None
        if literals is None:
            args, kwargs = fx.map_arg(node.args, operand), fx.map_arg(node.kwargs, operand)
        else:
            own = iter(literals)

            def value(leaf: Any) -> Any:
                other = next(own)
                return operand(leaf) if isinstance(leaf, fx.Node) else other

            args, kwargs = tree(value, (node.args, node.kwargs))
        with of_the_model():
            if node.op == "call_module":
                return self.module.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs) if node.op == "call_function" else args[0]  # type: ignore[operator]

    def put(self, name: str, number: int, value: Any) -> None:
        """Replace the value of a node for one batch, after weights before it have changed."""
        values = self.values[name]
        if isinstance(values, list):
            values[number] = value
        elif isinstance(values, Recomputed):
            values.forget()

    def keep(self, names: Iterable[str], until: str) -> None:
        """Keep the values of these nodes at least until a node has run."""
        for name in names:
            if name in self.last:
                self._hold(name, until)

    def _hold(self, name: str, until: str) -> None:
        """Keep the values of a node until another one has run, and those from which they are computed again."""
        last = self.last.get(name)
        if last is not None and self.order[last] < self.order[until]:
            self.expires[last].remove(name)
            self.expires.setdefault(until, []).append(name)
            self.last[name] = until
            if isinstance(self.values.get(name), Recomputed):
                for source in self.named[name].all_input_nodes:
                    self._hold(source.name, until)

    def free(self, name: str) -> None:
        """Free the values that no node after this one reads."""
        for source in self.expires.get(name, ()):
            self.values.pop(source, None)
        if not self.named[name].users:
            self.values.pop(name, None)
