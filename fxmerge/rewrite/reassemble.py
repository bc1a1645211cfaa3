"""Assembles the model that a merge returns: the graph module, or for a recorded model, the user's own class.

Each part of a recorded model (see `capture/record.py`) is cut out of the merged graph as a graph module. In a copy of
the user's model, these graph modules replace the original submodules.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.graph.odd_names import writable
from fxmerge.ir.capture import Capture, Part
from fxmerge.weights.by_path import Weights
from fxmerge.weights.copy import deep_copy


def assembled(captured: Capture, merged: fx.GraphModule) -> nn.Module:
    """The model that users get for a merged, or otherwise changed, copy of the captured graph module.

    Raises FxMergeError where a part that is called several times would need different sizes in its calls.
    """
    recorded = captured.recorded
    if recorded is None:
        return merged
    tensors = [*recorded.host.parameters(), *recorded.host.buffers()]
    host = deep_copy(recorded.host, tensors)
    nodes = {n.name: n for n in merged.graph.nodes}
    inside = {name for part in recorded.parts for name in part.nodes}
    modules = {
        id(m): [p for p, other in host.named_modules(remove_duplicate=False) if other is m]
        for m in nn.Module.modules(host)
    }
    paths = {p: same for same in modules.values() for p in same}
    for part in sorted(recorded.parts, key=lambda p: p.path):
        new = _part(part, merged, nodes, host.get_submodule(part.path))
        for path in paths.get(part.path, [part.path]):
            _put(host, path, new)
    for node in merged.graph.nodes:
        if node.name in inside:
            continue
        if node.op == "call_module":
            for path in paths.get(str(node.target), []):
                _put(host, path, merged.get_submodule(str(node.target)))
        elif node.op == "get_attr" and not node.meta.get("constant"):
            owner, _, name = str(node.target).rpartition(".")
            if owner in paths or not owner:
                setattr(host.get_submodule(owner), name, getattr(merged.get_submodule(owner), name))
    weights = Weights(host, frozenset(id(t) for t in tensors))
    _tie(weights, recorded.host)
    weights.own_all()
    return host


def _tie(weights: Weights, original: nn.Module) -> None:
    """Gives modules that were not run, such as T5's `shared`, the tensors that they have in common with others.

    Only where the others have one tensor now, of the original's shape.
    """
    names: dict[Tensor, list[str]] = {}
    for tensors in (original.named_parameters, original.named_buffers):
        for path, value in tensors(remove_duplicate=False):
            names.setdefault(value, []).append(path)
    for value, paths in names.items():
        now = dict.fromkeys(tensor for path in paths if (tensor := weights.find(path)) is not None)
        others = [tensor for tensor in now if tensor is not value]
        if value in now and len(others) == 1 and others[0].shape == value.shape:
            weights.tie(value, others[0])


def _put(host: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    host.get_submodule(owner)._modules[name] = module


def _part(part: Part, merged: fx.GraphModule, nodes: dict[str, fx.Node], original: nn.Module) -> fx.GraphModule:
    """The graph module of one part, from its nodes in the merged graph."""
    for other in part.again:
        for one, two in zip(part.nodes, other, strict=True):
            if one in nodes and two in nodes and _form(nodes[one]) != _form(nodes[two]):
                raise FxMergeError(
                    f"{part.path} is called several times and would need different sizes in each call (at {one})"
                )
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for name, placeholder, default in part.entered:
        argument = graph.placeholder(placeholder, default_value=default[0] if default else inspect.Parameter.empty)
        if name in nodes:  # what the part does not use has no node, but is an argument of its calls
            made[nodes[name]] = argument
    entered = {name for name, _, _ in part.entered}

    def local(node: fx.Node) -> fx.Node:
        if node not in made:  # a node that fetches a bias added by the merge
            made[node] = graph.node_copy(node, local)
        return made[node]

    for name in part.nodes:
        if name in nodes and name not in entered:
            local(nodes[name])
    graph.output(fx.map_arg(part.result, lambda n: made[nodes[n.name]]))
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix(part.path + ".")
    try:
        root = merged.get_submodule(part.path)
    except AttributeError:  # a part without parameters
        root = nn.Module()
    new = fx.GraphModule(root, writable(graph), part.class_name)
    new.training = original.training
    held = {**vars(nn.Module()), **vars(new)}
    for name, value in vars(original).items():  # attributes that other code may read, such as `backbone.out_channels`
        if name not in held and not callable(value):
            new.__dict__[name] = value
    return new


def _form(node: fx.Node) -> Any:
    """The op, target and literal arguments of a node."""
    return node.op, node.target, str(fx.map_arg((node.args, node.kwargs), lambda n: n.graph.output_node()))
