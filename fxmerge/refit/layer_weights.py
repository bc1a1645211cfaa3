"""The weights of a graph module's layers as matrices, and how refit replaces them, with a bias where there is none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxmerge.calibration.patches import Form, form_of, matrices_of, operands, weight_of
from fxmerge.ir.provenance import Layer, can_shift
from fxmerge.weights.by_path import Weights, at, fetch_bias


@dataclass(frozen=True)
class LayerWeights:
    """The geometry of a layer's call and its parameters: the tensors themselves, not copies."""

    form: Form
    weight: Tensor
    bias: Tensor | None

    @property
    def matrices(self) -> Tensor:
        """The weight as W (g, o, p), in its own dtype; a view of it, where that is possible."""
        return matrices_of(self.weight, self.form)

    @property
    def offsets(self) -> Tensor:
        """The bias as b (g, o), float64; zeros without a bias."""
        matrices = self.matrices
        blocks = matrices.shape[:2]
        zeros = matrices.new_zeros(blocks, dtype=torch.float64)
        return zeros if self.bias is None else self.bias.double().view(blocks)


class GraphWeights:
    """The weights of the layers of one graph module."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.weights = module, Weights(module)

    def owner(self, node: fx.Node) -> nn.Module | None:
        """The submodule that a node calls; None for any other op."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def weight(self, layer: Layer) -> Tensor:
        return self.weights[layer.params["weight"]]

    def form(self, node: fx.Node, layer: Layer) -> Form | None:
        return form_of(node, layer, self.owner(node), self.weight(layer))

    def of(self, node: fx.Node, layer: Layer) -> LayerWeights | None:
        """The layer's weights; None where the geometry of its call is unknown."""
        form = self.form(node, layer)
        return None if form is None else LayerWeights(form, self.weight(layer), self.bias(node, layer))

    def bias(self, node: fx.Node, layer: Layer) -> Tensor | None:
        """The bias, if there is one: the layer's own, or one added by the decomposition or by an earlier solution."""
        owner = self.owner(node)
        if "bias" in layer.params:
            return self.weights[layer.params["bias"]]
        given = getattr(owner, "bias", None) if owner is not None else operands(node, layer.op).get("bias")
        return at(self.module, str(given.target)) if isinstance(given, fx.Node) else given

    def write(self, node: fx.Node, layer: Layer, matrices: Tensor, offsets: Tensor) -> None:
        """Replace a layer's weight and bias by W (g, o, p) and b (g, o). A matrix product keeps no bias."""
        held, owner, path = self.of(node, layer), self.owner(node), layer.params["weight"]
        assert held is not None
        held.weight.data.copy_(weight_of(matrices, held.form, held.weight))
        if "bias" in layer.params:
            self.weights[layer.params["bias"]].data.copy_(offsets.flatten())
        elif can_shift(layer):
            value = offsets.flatten().to(held.weight)
            if held.bias is not None:
                held.bias.data.copy_(value)
                return
            prefix, _, name = path.rpartition(".")
            added = f"{prefix}.{'bias' if owner is not None else name + '_bias'}".lstrip(".")
            self.weights.add(added, value, held.weight.requires_grad)
            if owner is None:
                fetch_bias(node, added)
