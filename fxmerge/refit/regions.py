"""Regions: the layers that write and the layers that read the same channels, with all nodes between them.

Nothing else reads what is computed inside a region. Its layers can thus be fitted together: only the outputs of its
last layers have to be the original's.

| network | a region |
|---|---|
| a chain of layers | a layer and the one after it, with the depthwise layers between them |
| SqueezeNet | a squeeze and both expands; both expands and the next squeeze |
| attention | q, k, v and the output projection |
| gated linear units | gate, up and down |
| squeeze-and-excitation | the layer before it, both of its own, and the layer after it |
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from fxmerge.calibration.epilogue import SOLVED
from fxmerge.calibration.patches import input_of
from fxmerge.calibration.tail import Recomputed
from fxmerge.ir.provenance import Layer

MOST = 8  # layers of a region; those of a long residual stream are left to single layers


@dataclass(kw_only=True)
class Region:
    """Layers that are fitted together.

    nodes:     from the first layers to the last ones, in execution order
    layers:    those among them that are fitted
    ends:      the last layers, whose outputs leave the region, in execution order
    replay:    all nodes before the final end that depend on a first layer
    outside:   the names of the nodes that `replay` and `nodes` read from outside of the region
    inputs:    the names of the nodes that the ends read
    """

    nodes: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]
    ends: tuple[str, ...]
    replay: tuple[fx.Node, ...]
    outside: frozenset[str]
    inputs: frozenset[str]
    versions: dict[str, list[int]] = field(default_factory=dict)  # of the outside values, by node and batch

    @property
    def starts(self) -> tuple[str, ...]:
        """The layers whose inputs come from outside."""
        names = {node.name for node in self.nodes}
        firsts = (n for n in self.nodes if not any(s.name in names for s in n.all_input_nodes))
        return tuple(node.name for node in firsts)

    def watch(self, node: fx.Node, values: Mapping[str, Sequence[object]]) -> None:
        """Remember the versions of the outside values that a node is about to read."""
        for source in node.all_input_nodes:
            if source.name in self.outside and source.name in values:
                self.versions.setdefault(source.name, _versions(values[source.name]))

    def intact(self, values: Mapping[str, Sequence[object]]) -> bool:
        """Whether all outside values are available, and no op has written to them since they were read."""
        return all(name in values for name in self.outside) and all(
            _versions(values[name]) == versions for name, versions in self.versions.items()
        )


def _versions(values: Sequence[object]) -> list[int]:
    if isinstance(values, Recomputed):  # no op writes to them
        return []
    return [x._version if isinstance(x, Tensor) else 0 for x in values]


def regions(
    layers: Mapping[str, Layer],
    nodes: Sequence[fx.Node],
    lost: Callable[[Layer], bool],
    shared: Container[str],
    idle: Container[str] = (),
) -> list[Region]:
    """The regions in which a layer that reads from another one has lost input channels, in the order of their ends.

    layers: by node; lost: whether a layer lost input channels; shared: the weights that serve several calls;
    idle: the nodes that are not run (see `SampleRun`), which no region contains
    """
    found: list[Region] = []
    ended: set[str] = set()
    walk = _Walk(layers, nodes, shared, idle)
    for node in nodes:
        if node.name in ended or not walk.ends_at(node) or not lost(layers[node.name]):
            continue
        region = walk.region(node)
        if region is not None:
            found.append(region)
            ended |= {*region.ends}
    return sorted(found, key=lambda region: walk.order[region.ends[-1]])


class _Walk:
    def __init__(
        self, layers: Mapping[str, Layer], nodes: Sequence[fx.Node], shared: Container[str], idle: Container[str]
    ) -> None:
        self.layers, self.nodes, self.shared, self.idle = layers, nodes, shared, idle
        self.order = {node.name: number for number, node in enumerate(nodes)}
        self.live: set[fx.Node] = set()  # the nodes that depend on a layer
        for node in nodes:
            if node.name in layers or self._depends(node, self.live):
                self.live.add(node)

    def _depends(self, node: fx.Node, others: Container[fx.Node]) -> bool:
        return node.name not in self.idle and any(source in others for source in node.all_input_nodes)

    def ends_at(self, node: fx.Node) -> bool:
        """Whether a region can begin or end at a node: a linear layer or convolution that is not depthwise."""
        layer = self.layers.get(node.name)
        return layer is not None and layer.op in SOLVED and layer.op != "depthwise"

    def region(self, last: fx.Node) -> Region | None:
        """The region that ends at a layer; None where there is none that can be fitted."""
        self.inside: set[fx.Node] = set()  # nodes whose values nothing outside reads
        self.takes = {last}  # layers whose inputs are inside
        ahead = [input_of(last, self.layers[last.name].op)]
        while ahead:
            if not self._reach(ahead):
                return None
            deeper = self._deeper()
            if deeper is not None:
                self.takes.add(deeper)
                ahead = [input_of(deeper, self.layers[deeper.name].op)]
        return self._made()

    def _starts_at(self, node: fx.Node) -> bool:
        """Whether a node is a layer that writes into the region and reads from outside."""
        return node in self.inside and self.ends_at(node) and node not in self.takes

    def _reach(self, ahead: list[fx.Node]) -> bool:
        """Add these nodes, and all that must be inside with them. Returns False if that cannot be."""
        while ahead:
            node = ahead.pop()
            if node in self.inside or node not in self.live:
                continue
            if not self._fits(node):
                return False
            self.inside.add(node)
            if not self.ends_at(node):
                ahead += [source for source in node.all_input_nodes if source.op != "get_attr"]
            for user in node.users:
                if not self.ends_at(user):
                    ahead.append(user)
                elif input_of(user, self.layers[user.name].op) is node:
                    self.takes.add(user)
                else:
                    return False
            if len(self._fitted(self.inside | self.takes)) > MOST:
                return False
        return True

    def _fits(self, node: fx.Node) -> bool:
        if node.op not in ("call_module", "call_function", "call_method") or node.name in self.idle:
            return False
        layer = self.layers.get(node.name)
        if layer is None:
            return True
        return layer.op in SOLVED or (layer.reads is None and layer.writes is None and not layer.operation.is_recurrent)

    def _fitted(self, nodes: Iterable[fx.Node]) -> list[Layer]:
        found = (self.layers.get(node.name) for node in nodes)
        return [layer for layer in found if layer is not None and layer.op in SOLVED]

    def _after(self, starts: Callable[[fx.Node], bool], until: fx.Node | None = None) -> Iterator[fx.Node]:
        """The nodes for which `starts` is True and all that depend on them, before `until`, in execution order."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node is until:
                return
            if starts(node) or self._depends(node, found):
                found.add(node)
                yield node

    def _deeper(self) -> fx.Node | None:
        """A layer that writes into the region and reads from outside, though it depends on the region."""
        after = set(self._after(lambda node: node in self.inside or node in self.takes))
        for node in self.inside:
            if self._starts_at(node) and any(source in after for source in node.all_input_nodes):
                return node
        return None

    def _made(self) -> Region | None:
        ends = sorted(self.takes - self.inside, key=lambda n: self.order[n.name])
        if not ends:
            return None
        replay = list(self._after(self._starts_at, ends[-1]))
        depends = {*replay, ends[-1]}
        nodes = sorted((self.inside | self.takes) & depends, key=lambda n: self.order[n.name])
        fitted = self._fitted(nodes)
        if len(fitted) < 2 or any(layer.params["weight"] in self.shared for layer in fitted):
            return None
        if any(node.name in self.layers for node in depends.difference(nodes)):
            return None  # a layer has been solved for what the region will change
        read = {source for node in depends for source in node.all_input_nodes if source.op != "get_attr"}
        return Region(
            nodes=tuple(nodes),
            layers=tuple(fitted),
            ends=tuple(node.name for node in ends),
            replay=tuple(replay),
            outside=frozenset(source.name for source in read - depends),
            inputs=frozenset(input_of(end, self.layers[end.name].op).name for end in ends),
        )
