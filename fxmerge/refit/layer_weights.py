"""Placing: where the weights of a graph's layers are, and how to write others there; a bias where there is none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxmerge.calibration.patches import Form, form_of, operands, rows_of, weight_of
from fxmerge.ir.provenance import Layer, can_shift
from fxmerge.weights.by_path import Weights, at, fetch_bias


@dataclass(frozen=True)
class Place:
    """A layer's call in the merged graph, its geometry and the weights that are there, float64."""

    layer: Layer
    node: fx.Node
    form: Form
    start: Tensor  # (g, o, p)
    bias: Tensor  # (g, o)


class Places:
    """The layers of one graph module."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.weights = module, Weights(module)

    def owner(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def form(self, node: fx.Node, layer: Layer) -> Form | None:
        return form_of(node, layer, self.owner(node), self.weights[layer.params["weight"]])

    def of(self, node: fx.Node, layer: Layer) -> Place | None:
        form = self.form(node, layer)
        if form is None:
            return None
        start, held = rows_of(self.weights[layer.params["weight"]], form).double(), self.bias(node, layer)
        bias = start.new_zeros(start.shape[:2]) if held is None else held.double().view(start.shape[:2])
        return Place(layer, node, form, start, bias)

    def bias(self, node: fx.Node, layer: Layer) -> Tensor | None:
        """The bias that is there: the layer's own, or one that absorbing or an earlier solution gave it."""
        owner = self.owner(node)
        if "bias" in layer.params:
            return self.weights[layer.params["bias"]]
        given = getattr(owner, "bias", None) if owner is not None else operands(node, layer.op).get("bias")
        return at(self.module, str(given.target)) if isinstance(given, fx.Node) else given

    def write(self, place: Place, weight: Tensor, bias: Tensor) -> None:
        layer, owner, path = place.layer, self.owner(place.node), place.layer.params["weight"]
        old = self.weights[path]
        old.data.copy_(weight_of(weight, place.form, old))
        if "bias" in layer.params:
            self.weights[layer.params["bias"]].data.copy_(bias.flatten())
        elif can_shift(layer):
            held, value = self.bias(place.node, layer), bias.flatten().to(old)
            if held is not None:
                held.data.copy_(value)
                return
            prefix, _, name = path.rpartition(".")
            added = f"{prefix}.{'bias' if owner is not None else name + '_bias'}".lstrip(".")
            self.weights.add(added, value, old.requires_grad)
            if owner is None:
                fetch_bias(place.node, added)
