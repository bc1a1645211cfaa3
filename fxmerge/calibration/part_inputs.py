"""Runs the user's own code on samples, for refit of a model that is captured in parts.

The recorded graph shows one run on the example inputs. Its nodes are divided:

    parts  the nodes of the traced submodules and the layers that the user's code calls
    links  the user's calls between them that channels pass on their way to a layer, such as an add or `flatten`
    idle   all other nodes of the user's code: it prepares inputs, decides, chooses boxes

For another sample, the user's code is recorded once more, and the nodes of both recordings are matched: the k-th call
of a part or a layer with the k-th, and the links by what they call and read. Everything that an idle node hands to
other nodes is then known for this sample. The original and the merged graph get the same: *the original's*. So both
take the same decisions, and the rows of their layers correspond, although the merged model's own boxes would differ.
What passes links, or goes from one part to another directly, is each graph's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.sample_run import SampleRun
from fxmerge.errors import first_line
from fxmerge.graph.eval_mode import evaluating, reproducible
from fxmerge.graph.nested import fresh, leaves
from fxmerge.graph.ops import tensors
from fxmerge.ir.capture import Capture, Recorded
from fxmerge.ir.labels import numbers
from fxmerge.ir.provenance import Lab, Provenance

OTHER_PATH = "takes another path through the model's code than the example inputs"


@dataclass(frozen=True)
class Declined:
    """Why refit cannot use a sample. failed: whether the model fails on it."""

    reason: str
    failed: bool = False


class OwnCode:
    """The user's own code of a model that is captured in parts."""

    def __init__(self, captured: Capture, facts: Provenance) -> None:
        assert captured.recorded is not None
        self.captured, self.facts, self.recorded = captured, facts, captured.recorded
        self.nodes = list(captured.module.graph.nodes)

    @cached_property
    def parts(self) -> frozenset[str]:
        """The nodes of the parts, what enters them, and the layers that the user's code calls."""
        entered = {name for part in self.recorded.parts for call in (part.nodes, *part.again) for name in call}
        layers = {layer.node for layer in self.facts.layers}
        return frozenset(entered | layers | {n.name for n in self.nodes if n.name not in self.recorded.glue})

    @cached_property
    def links(self) -> frozenset[str]:
        """The nodes of the user's code that channels pass on their way to a layer."""
        read = torch.zeros(self.facts.label_count, dtype=torch.bool)
        for layer in self.facts.layers:
            for labels in (layer.reads, layer.carries):
                if labels is not None:
                    read[numbers(labels)] = True
        wanted, found = set(self.parts), set[str]()
        for node in reversed(self.nodes):
            if node.name in wanted:
                sources = {*self.facts.sources[node.name], *(n.name for n in node.all_input_nodes)}
                new = {name for name in sources - self.parts if self._is_link(name, read)}
                found |= new
                wanted |= new
        return frozenset(found)

    def _is_link(self, name: str, read: Tensor) -> bool:
        node = self._named[name]
        if node.op not in ("call_function", "call_method", "call_module"):
            return False
        if name in self.facts.views:
            return True
        labels = self.facts.labels.get(name)
        held = [labels] if labels is not None else [v.t for v in leaves(self.facts.values.get(name)) if _is_lab(v)]
        follows = any(source.name in self._depending for source in node.all_input_nodes)
        return follows and self.facts.kinds[name] != "unknown" and any(bool(read[numbers(t)].any()) for t in held)

    @cached_property
    def _depending(self) -> set[str]:
        """The nodes that depend on a part, and not on the inputs and constants alone."""
        found: set[str] = set()
        for node in self.nodes:
            if node.name in self.parts or any(source.name in found for source in node.all_input_nodes):
                found.add(node.name)
        return found

    @cached_property
    def _named(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def idle(self) -> frozenset[str]:
        """The nodes that no graph runs."""
        run = self.parts | self.links
        return frozenset(n.name for n in self.nodes if n.name not in run and n.op != "output" and not _is_parameter(n))

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The nodes whose values the rest of the user's code reads, with channels that are all kept."""
        pinned = torch.zeros(self.facts.label_count, dtype=torch.bool)
        for pin in self.facts.pins:
            pinned[numbers(pin.labels)] = True
        found = []
        for node in self.nodes:
            labels = self.facts.labels.get(node.name)
            seen = any(user.name in self.idle or user.op == "output" for user in node.users)
            if seen and node.name not in self.idle and labels is not None and bool(pinned[numbers(labels)].all()):
                found.append(node.name)
        return tuple(found)

    @property
    def follows(self) -> tuple[str, ...]:
        """The parts and layers whose inputs the user's code computes from what other parts return."""
        found: dict[str, None] = {}
        paths = {name: part.path for part in self.recorded.parts for c in (part.nodes, *part.again) for name in c}
        for node in self.nodes:
            if node.name in self.parts and any(s.name in self.idle & self._depending for s in node.all_input_nodes):
                found[paths.get(node.name, str(node.target))] = None
        return tuple(found)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SampleRun | Declined:
        """What reaches the parts when the original runs on a sample, or why this is not known."""
        module = self.captured.module
        with evaluating(self.recorded.host, module), torch.no_grad(), reproducible():
            try:
                other = self.recorded.again(fresh(args), fresh(dict(kwargs)))
            except Exception as error:  # the user's code may raise anything
                return Declined(f"fails ({type(error).__name__}: {first_line(error)})", failed=True)
            twins = _Match(self, other).twins()
            if twins is None:
                return Declined(OTHER_PATH)
            seen = _Seen(other.module, {twins[n.name] for n in self.nodes if n.name in twins and self._reads_idle(n)})
            seen.run(*fresh(list(other.inputs)), enable_io_processing=False)
        given: dict[str, Any] = {}
        for node in self.nodes:
            if node.name in twins and self._reads_idle(node):
                for leaf, value in zip(leaves([node.args, node.kwargs]), seen.values[twins[node.name]], strict=True):
                    if isinstance(leaf, fx.Node) and leaf.name in self.idle:
                        given.setdefault(leaf.name, value)
        found = [t for value in given.values() for t in tensors(value)]
        if any(not t.numel() for t in found):
            return Declined("gives some parts no rows")
        if not all(bool(torch.isfinite(t).all()) for t in found):
            return Declined("gives NaN or infinity", failed=True)
        literals = {name: tuple(leaves([twins[name].args, twins[name].kwargs])) for name in self.links}
        return SampleRun(inputs=self.captured.inputs, idle=self.idle, ends=self.ends, given=given, literals=literals)

    def _reads_idle(self, node: fx.Node) -> bool:
        return node.op != "output" and any(s.name in self.idle for s in node.all_input_nodes)


class _Match:
    """Matches the nodes of the example's recording with those of another one."""

    def __init__(self, own: OwnCode, other: Recorded) -> None:
        self.own, self.other, self.found = own, other, dict[str, fx.Node]()
        self.taken: set[fx.Node] = set()

    def twins(self) -> dict[str, fx.Node] | None:
        """By node of a part and by link: the node of the other recording; None if it lacks one."""
        named = {node.name: node for node in self.other.module.graph.nodes}
        parts = {part.path: (part.nodes, *part.again) for part in self.other.parts}
        for part in self.own.recorded.parts:
            calls = (part.nodes, *part.again)
            if len(parts.get(part.path, ())) < len(calls):
                return None
            for ours, theirs in zip(calls, parts[part.path], strict=False):
                self.found |= {one: named[two] for one, two in zip(ours, theirs, strict=True)}
        self.taken |= set(self.found.values())
        candidates: dict[tuple[str, Any], list[fx.Node]] = {}
        for node in named.values():
            if node not in self.taken:
                candidates.setdefault((node.op, node.target), []).append(node)
        for node in self.own.nodes:
            if node.name in self.found:
                if not self._agree(node, self.found[node.name]):
                    return None
            elif node.name in self.own.parts or node.name in self.own.links:
                twin = next((c for c in candidates.get((node.op, node.target), ()) if self._fits(node, c)), None)
                if twin is None:
                    return None
                self.found[node.name] = twin
                self.taken.add(twin)
        return self.found

    def _fits(self, node: fx.Node, candidate: fx.Node) -> bool:
        return candidate not in self.taken and self._agree(node, candidate)

    def _agree(self, node: fx.Node, twin: fx.Node) -> bool:
        """Whether two nodes read the same: nodes that are matched with each other, or some values of idle nodes."""
        ours, theirs = leaves([node.args, node.kwargs]), leaves([twin.args, twin.kwargs])
        if len(ours) != len(theirs):
            return False
        for one, two in zip(ours, theirs, strict=True):
            if isinstance(one, fx.Node) != isinstance(two, fx.Node):
                return False
            if isinstance(one, fx.Node) and one.name in self.found and self.found[one.name] is not two:
                return False
            if isinstance(one, fx.Node) and one.name not in self.found and two in self.taken:
                return False
        return True


class _Seen(fx.Interpreter):
    """Runs a recording until some nodes have run, and keeps what they read, in the state in which they read it."""

    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.missing, self.values = set(nodes), dict[fx.Node, Sequence[Any]]()

    def run_node(self, n: fx.Node) -> Any:
        if not self.missing:
            return None
        if n in self.missing:
            read = leaves([n.args, n.kwargs])
            self.values[n] = [fresh(self.env[leaf]) if isinstance(leaf, fx.Node) else None for leaf in read]
            self.missing.discard(n)
        return super().run_node(n)


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "get_attr" and not node.meta.get("constant")


def _is_lab(value: Any) -> bool:
    return isinstance(value, Lab)
