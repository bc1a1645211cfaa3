"""Mixtures of experts whose experts can leave as a whole, together with their row of the router.

A mixture is what the stacked parameters of one routing have in common (`Stack.key`). From the numbers of the experts
that were chosen, the graph is followed back to the linear layer that gives each expert its score, and from there on
(`expert_ops.follow`) to the end: the node through which all that depends on the experts is read. A mixture is refused
where an op on the way cannot be followed, or where a parameter is used elsewhere too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxmerge.analysis.expert_axes import ExpertAxes
from fxmerge.analysis.expert_ops import follow, start
from fxmerge.errors import source_line
from fxmerge.graph.ops import updates
from fxmerge.ir.capture import Capture
from fxmerge.ir.mixtures import Mixture
from fxmerge.ir.provenance import Layer, Provenance, Stack
from fxmerge.rules.call_names import call_name, layer_name
from fxmerge.weights.by_path import at


@dataclass(frozen=True)
class Closed:
    """A mixture whose experts all stay, and why."""

    name: str
    reason: str


def mixtures(captured: Capture, facts: Provenance) -> tuple[tuple[Mixture, ...], tuple[Closed, ...]]:
    """(the mixtures whose experts can leave, those whose experts cannot), in the order of their routers."""
    routings: dict[str, list[Stack]] = {}
    for stack in facts.stacks:
        routings.setdefault(stack.key, []).append(stack)
    found, closed, walk = list[Mixture](), list[Closed](), _Walk(captured, facts)
    for key, stacks in routings.items():
        name = _common([stack.path for stack in stacks])
        if name in [*(one.name for one in found), *(one.name for one in closed)]:
            name = f"{name} at {key}"
        made = walk.found(name, key, stacks)
        if isinstance(made, Mixture):
            found.append(made)
        else:
            closed.append(Closed(name, made))
    return _apart(captured, found, closed)


def _apart(
    captured: Capture, found: Sequence[Mixture], closed: Sequence[Closed]
) -> tuple[tuple[Mixture, ...], tuple[Closed, ...]]:
    """Refuses mixtures that share a parameter with another one."""
    users: dict[int, set[str]] = {}
    for mixture in found:
        for path in mixture.tensors:
            users.setdefault(id(at(captured.module, path)), set()).add(mixture.name)
    shared = {name for names in users.values() if len(names) > 1 for name in names}
    more = [Closed(name, "its parameters are those of another mixture too") for name in sorted(shared)]
    return tuple(m for m in found if m.name not in shared), (*closed, *more)


class _Walk:
    def __init__(self, captured: Capture, facts: Provenance) -> None:
        self.captured, self.facts = captured, facts
        self.nodes: list[fx.Node] = list(captured.module.graph.nodes)
        self.named = {node.name: node for node in self.nodes}
        self.at = {node: number for number, node in enumerate(self.nodes)}
        self.layers = {layer.node: layer for layer in facts.layers if layer.writes is not None}

    def found(self, name: str, key: str, stacks: Sequence[Stack]) -> Mixture | str:
        """The mixture of these stacks, or why its experts cannot leave."""
        counts = {stack.experts for stack in stacks}
        if self.captured.recorded is not None:
            return "only parts of the model could be traced, and its own code cannot be edited"
        if key not in self.named or len(counts) != 1:
            return "what chooses among its experts is not known"
        router = self._router(self.named[key])
        if router is None or router.op != "linear":
            return "its experts are not chosen by the scores of one linear layer"
        (experts,) = counts
        axes = ExpertAxes(self.captured, self.facts, experts, frozenset(stack.path for stack in stacks))
        first = self.named[router.node]
        if why := start(axes, first, router.params):
            return why
        for node in self.nodes:
            if node is not first and (why := follow(axes, node)):
                return f"{why} [{source_line(node)}]"
        inside = self._depending(first, axes)
        end = self._end(inside, axes)
        if end is None:
            return "there is no one value by which the rest of the model reads its experts"
        inside = [node for node in inside if self.at[node] <= self.at[end]]
        if any(stack.path not in axes.tensors for stack in stacks):
            return "what chooses among its experts is not known"
        if why := self._shared(axes.tensors, inside) or self._updated(inside):
            return why
        return Mixture(
            name=name,
            layers=(router.module, *dict.fromkeys(layer_name(stack.path) for stack in stacks)),
            router=router.node,
            experts=experts,
            groups=axes.groups,
            least=axes.least(),
            tensors=axes.tensors,
            sizes=tuple(axes.sizes),
            choices=axes.choices,
            nodes=tuple(node.name for node in inside),
            end=end.name,
            output=self._output(end).name,
        )

    def _router(self, numbers: fx.Node) -> Layer | None:
        """The one layer from whose outputs these numbers are chosen."""
        found, ahead, seen = dict[str, Layer](), [numbers], {numbers}
        while ahead:
            node = ahead.pop()
            if node.name in self.layers:
                found[node.name] = self.layers[node.name]
                continue
            fresh = [source for source in node.all_input_nodes if source not in seen]
            seen.update(fresh)
            ahead += fresh
        return next(iter(found.values())) if len(found) == 1 else None

    def _depending(self, first: fx.Node, axes: ExpertAxes) -> list[fx.Node]:
        """The nodes that depend on the router or on the stacks, in execution order."""
        inside = {first}
        for node in self.nodes:
            held = node.op != "get_attr" and axes.values.get(node.name) is not None
            if held or any(source in inside for source in node.all_input_nodes):
                inside.add(node)
        return sorted(inside, key=self.at.__getitem__)

    def _end(self, inside: Sequence[fx.Node], axes: ExpertAxes) -> fx.Node | None:
        """The first of these nodes by which alone all later ones depend on those before it."""
        reached = max((self.at[user] for n in self.nodes if axes.values.get(n.name) for user in n.users), default=0)
        for node in inside:
            if self.at[node] >= reached and node.op != "output":
                return node
            reached = max(reached, *(self.at[user] for user in node.users), 0)
        return None

    def _shared(self, tensors: Mapping[str, int], inside: Sequence[fx.Node]) -> str:
        """Why a parameter cannot lose entries: a node outside reads it; or ""."""
        held, paths = set(inside), {id(at(self.captured.module, path)): path for path in tensors}
        for node in self.nodes:
            if node.op == "call_module" and node not in held:
                for held_there in self.captured.module.get_submodule(str(node.target)).parameters():
                    if id(held_there) in paths:
                        return f"{paths[id(held_there)]} is used elsewhere too"
            elif node.op == "get_attr":
                value = at(self.captured.module, str(node.target))
                outside = [user for user in node.users if user not in held]
                if outside and id(value) in paths:
                    return f"{call_name(node)} is used elsewhere too [{source_line(outside[0])}]"
        return ""

    def _updated(self, inside: Sequence[fx.Node]) -> str:
        """Why these nodes cannot be run twice: one of them updates a value from outside in place; or ""."""
        held = set(inside)
        for node in inside:
            first = node.args[0] if node.args else None
            if isinstance(first, fx.Node) and first not in held and updates(self.captured.module, node):
                return f"{call_name(node)} updates a tensor in place [{source_line(node)}]"
        return ""

    def _output(self, end: fx.Node) -> fx.Node:
        """The first node from the end on that reads another activation as well, or that several nodes read."""
        node, inside = end, {end}
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.op == "output":
                break
            inside.add(user)
            node = user
            if any(self._is_activation(source) for source in user.all_input_nodes if source not in inside):
                break
        return node

    def _is_activation(self, node: fx.Node) -> bool:
        dtype = self.captured.dtypes.get(node.name)
        return node.op not in ("get_attr", "placeholder") and dtype is not None and dtype.is_floating_point


def _common(paths: Sequence[str]) -> str:
    """The module that holds all of these parameters, or the first of them if there is none."""
    parts = [path.split(".")[:-1] for path in paths]
    same = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
    return ".".join(same) or paths[0]
