"""Which layers without a bias may be given one."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance, without_new_biases
from fxmerge.options import Options
from fxmerge.weights.by_path import at

FEW = 0.05  # of the weights of all layers that could be given one
ABLE = ("linear", "conv", "depthwise", "conv_transpose")


def limited(captured: Capture, facts: Provenance, options: Options) -> Provenance:
    """The facts with those layers marked that get no bias: all, if the options say so, or those without a place for it.

    A class has no place for the bias of a function call on a bare parameter, F.linear(x, self.weight), as routers of
    experts have it. If such layers have few of the weights, the class is worth more than their biases.
    """
    if not options.new_biases:
        return without_new_biases(facts)
    able = [layer for layer in facts.layers if layer.op in ABLE]
    weights = {layer.params["weight"]: at(captured.module, layer.params["weight"]).numel() for layer in able}
    homeless = _without_place(captured)
    bare = {la.params["weight"] for la in able if "bias" not in la.params and la.params["weight"] in homeless}
    few = sum(weights[path] for path in bare) <= FEW * sum(weights.values())
    if not bare or not (few or options.own_class):
        return facts
    nodes = {layer.node for layer in able if layer.params["weight"] in bare}
    return replace(facts, layers=tuple(replace(la, bare=la.bare or la.node in nodes) for la in facts.layers))


def _without_place(captured: Capture) -> set[str]:
    """The parameters of the user's model in whose module there is no place for a bias beside them."""
    if captured.model is None or isinstance(captured.model, fx.GraphModule):
        return set()
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in captured.model.named_modules(remove_duplicate=False)
        for name in module._parameters
        if not (name == "weight" and "bias" in module._parameters)
    }
