"""The epilogue of a layer: the norm, the add and the activation right after it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from fxmerge.calibration.paired_run import Pair
from fxmerge.calibration.rectifiers import Bounds, bounds_of
from fxmerge.ir.capture import Capture
from fxmerge.ir.layer_ops import NORMS
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.rules.lookup import rule_of

SOLVED = ("linear", "matrix", "conv", "depthwise", "conv_transpose")  # the ops of layers that refit re-solves
LEAST_GAIN = 0.05  # of the median |gain|: with a smaller gain a channel's output hardly matters


@dataclass(frozen=True)
class Epilogue:
    """The nodes that a layer's outputs pass right after it. What is absent is None."""

    norm: Layer | None
    other: fx.Node | None  # the other operand of the add
    bounds: Bounds | None  # of the rectifier: (0, inf) for ReLU, (0, 6) for ReLU6


def added(module: fx.GraphModule, node: fx.Node, norms: Collection[str]) -> fx.Node | None:
    """The add of a layer's outputs, past their norm, to another value; None without one."""
    _, following = _past_norm(module, node, norms)
    return following if _is_add(module, following) else None


def epilogue_of(module: fx.GraphModule, node: fx.Node, norms: dict[str, Layer], known: set[str]) -> Epilogue:
    """The epilogue of the layer at a node.

    norms: the BatchNorms by node; known: the nodes whose values are available, which the add's other operand must be
    """
    passed, following = _past_norm(module, node, norms)
    norm, other = None if passed is None else norms[passed.name], None
    if following is not None and _is_add(module, following):
        others = [n for n in following.all_input_nodes if n.name in known]
        if len(others) == 1 and "alpha" not in following.kwargs:
            other, following = others[0], _after(module, following)
        else:
            following = None
    return Epilogue(norm, other, bounds_of(following, module))


def _past_norm(module: fx.GraphModule, node: fx.Node, norms: Collection[str]) -> tuple[fx.Node | None, fx.Node | None]:
    """(the norm right after a node, the node after both), each None if there is none."""
    following = _after(module, node)
    if following is None or following.name not in norms:
        return None, following
    return following, _after(module, following)


def _is_add(module: fx.GraphModule, node: fx.Node | None) -> bool:
    """Does a node add two values?"""
    return _rule(module, node) == "add" and node is not None and len(node.all_input_nodes) == 2


def _after(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The only consumer of a node, past those that change nothing in evaluation mode; None if there are several."""
    found: fx.Node | None = node
    while found is not None:
        found = next(iter(found.users)) if len(found.users) == 1 else None
        if found is None or _rule(module, found) not in ("dropout", "identity", "stochastic_depth"):
            break
        owner = module.get_submodule(str(found.target)) if found.op == "call_module" else None
        if not isinstance(owner, (nn.Identity, nn.modules.dropout._DropoutNd)):
            break
    return found


def _rule(module: fx.GraphModule, node: fx.Node | None) -> str:
    rule = rule_of(node, module) if node is not None else None
    return rule.name if rule else ""


def pair(
    original: fx.GraphModule, facts: Provenance, merged: fx.GraphModule | None = None, alive: Tensor | None = None
) -> Pair:
    """The two graphs, or the original alone, as `PairedRun` takes them."""
    rectified = rectified_layers(original, facts)
    return Pair(original=original, facts=facts, rectified=rectified, merged=merged, alive=alive)


def against(
    captured: Capture, facts: Provenance, merged: fx.GraphModule, alive: Tensor, turned: fx.GraphModule,
    free: frozenset[str],
) -> Pair:  # fmt: skip
    """The original and a merged graph; the original has all residual branches and experts, also those left out.

    turned: the captured graph module with its groups rotated, of which the merged one is a part
    free:   the BatchNorms of rotated groups, which are not held
    """
    cut = captured.cut
    if cut is None:
        return replace(pair(turned, facts, merged, alive), free=free)
    if cut.target is not None:
        return replace(pair(cut.target, facts, merged, alive), starts=cut.starts)
    original, own = cut.whole.module, {layer.node: layer for layer in facts.layers}
    return Pair(
        original=original,
        facts=facts,
        rectified={name: own.get(name, layer) for name, layer in rectified_layers(original, cut.facts).items()},
        merged=merged,
        alive=alive,
        beyond=tuple(layer for layer in cut.facts.layers if layer.node not in facts.kinds),
        starts=cut.starts,
    )


def rectified_layers(module: fx.GraphModule, facts: Provenance) -> dict[str, Layer]:
    """The first layer on each path from the inputs that has a rectifier right after it, in a network without norms."""
    if any(layer.operation.is_norm for layer in facts.layers) or _normalises(module, facts):
        return {}
    layers = {layer.node: layer for layer in facts.layers if layer.op in SOLVED}
    found: dict[str, Layer] = {}
    reached: set[fx.Node] = set()  # the nodes that depend on a layer that was found
    for node in module.graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
        elif node.name in layers and (epilogue_of(module, node, {}, set()).bounds or (-1,))[0] == 0:
            found[node.name] = layers[node.name]
            reached.add(node)
    return found


def _normalises(module: fx.GraphModule, facts: Provenance) -> bool:
    """Does the graph divide channels by a norm, with or without parameters?"""
    mixing = {node for node, _ in facts.mixers}
    found = (rule_of(node, module) for node in module.graph.nodes if node.name in mixing)
    return any(rule is not None and rule.name in (*NORMS, "norm", "normalize") for rule in found)


@dataclass(frozen=True)
class Affine:
    """gain y + constant, (o,) and (o,), of the channels that stay.

    inverse: (o,) 1 / gain, but 0 where the gain is close to zero
    """

    gain: Tensor
    constant: Tensor
    inverse: Tensor


def affine(gain: Tensor, constant: Tensor) -> Affine:
    """The affine map with its inverse gains, which are 0 below LEAST_GAIN."""
    solid = gain.abs() > LEAST_GAIN * gain.abs().median()
    return Affine(gain, constant, torch.where(solid, 1 / torch.where(solid, gain, 1), 0))
