"""Chains: a layer that lost input channels, with the layer that produces them and the nodes between the two."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from fxmerge.calibration.epilogue import SOLVED
from fxmerge.calibration.patches import input_of
from fxmerge.ir.provenance import Layer


@dataclass
class Chain:
    """The nodes from a layer to the one layer that reads it, in order, and the layers among them that are fitted."""

    nodes: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]
    inputs: list[Tensor] = field(default_factory=list)  # of the first node, by batch, once the run has reached it
    versions: list[int] = field(default_factory=list)  # of the inputs, which tell whether an op has written to them

    def begin(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)
        self.versions = [x._version for x in inputs]

    def end(self) -> None:
        """Free the inputs, which are not needed any more."""
        self.inputs.clear()

    @property
    def intact(self) -> bool:
        """Whether the inputs are available and unchanged."""
        return bool(self.inputs) and self.versions == [x._version for x in self.inputs]


def chains(
    layers: Mapping[str, Layer], nodes: Sequence[fx.Node], lost: Callable[[Layer], bool], shared: Container[str]
) -> dict[str, Chain]:
    """The chains by their last nodes: layers for which `lost` is True, each with its producer.

    layers: by node; lost: whether a layer lost input channels; shared: the weights that serve several calls
    """
    found: dict[str, Chain] = {}
    for last in nodes:
        layer = layers.get(last.name)
        if layer is None or layer.op not in SOLVED or layer.op == "depthwise" or not lost(layer):
            continue
        way, fitted, node = [last], [layer], input_of(last, layer.op)
        while len(node.users) == 1 and node.op in ("call_module", "call_function", "call_method"):
            way.append(node)
            own = layers.get(node.name)
            if own is not None and own.operation.is_recurrent:
                break  # it reads the channels of the layer before it, and its gradient is slow
            if own is not None and own.op in SOLVED:
                fitted.append(own)
                if own.op != "depthwise":
                    break
            sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
            if len(sources) != 1:
                break
            node = sources[0]
        arrived = len(fitted) > 1 and fitted[-1].node == way[-1].name and fitted[-1].op != "depthwise"
        if arrived and not any(layer.params["weight"] in shared for layer in fitted):
            found[last.name] = Chain(tuple(way[::-1]), tuple(fitted[::-1]))
    return found
