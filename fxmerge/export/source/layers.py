"""Turn a graph into one that calls layers, as a person would write it. For generated source only.

The graph of an exported program calls aten ops on bare parameters. If all parameters of a module belong to one such
call, the call is replaced by a layer. A container whose items are only ever called one after the other becomes an
nn.Sequential. The merged module itself does not change.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.capture.torch_export import remove_guards
from fxmerge.export.source.containers import in_order
from fxmerge.weights.by_path import at
from fxmerge.weights.copy import sharing_copy

_PLAIN = (
    nn.Module,
    nn.Sequential,
)  # classes of modules in graph modules and exported programs that only hold parameters

_PURE = (
    getattr,
    operator.getitem,
    operator.eq,
    operator.ne,
    operator.floordiv,
)  # what remains of a traced assertion


def layered(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes the same, shares all tensors, and calls layers and sequences where possible."""
    copied, _ = sharing_copy(module)
    graph = copied.graph
    remove_guards(copied)
    for node in list(graph.nodes):
        made = _LAYERS.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
        if node.target is torch.ops.aten.dropout.default and node.args[2:] == (False,):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif made is not None and isinstance(node.target, torch._ops.OpOverload):
            _as_layer(copied, node, made)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op != "placeholder" and (node.op == "get_attr" or node.target in _PURE):
            graph.erase_node(node)
    for path, owner in reversed(list(copied.named_modules())):
        if path and type(owner) in _PLAIN and in_order(list(owner._modules)):
            _as_sequence(copied, path, owner)
    graph.lint()
    return copied


def _as_layer(module: fx.GraphModule, node: fx.Node, make: Callable[[Tensor, dict[str, Any]], nn.Module]) -> None:
    found = node.normalized_arguments(module, normalize_to_only_use_kwargs=True)
    given: dict[str, Any] = dict(found.kwargs) if found is not None else {}
    slots = {k: v for k, v in given.items() if k in _SLOTS and isinstance(v, fx.Node)}
    paths = {k: str(v.target).rpartition(".") for k, v in slots.items() if v.op == "get_attr"}
    owners = {owner for owner, _, _ in paths.values()}
    if "weight" not in paths or len(paths) != len(slots) or len(owners) != 1 or "" in owners:
        return
    path = owners.pop()
    owner = module.get_submodule(path)
    held = {k: v for k, v in {**owner._parameters, **owner._buffers}.items() if v is not None}
    named = {k: name for k, (_, _, name) in paths.items()}
    if any(k != name for k, name in named.items()) or owner._modules:
        return
    try:
        with torch.device("meta"):
            layer = make(at(module, f"{path}.weight"), given)
    except (TypeError, ValueError, KeyError):
        return
    own = {k for k, v in {**layer._parameters, **layer._buffers}.items() if v is not None}
    if type(owner) not in _PLAIN[:1] and (type(owner), repr(owner)) != (type(layer), repr(layer)):
        return
    if own != set(held) or any(getattr(layer, k).shape != held[k].shape for k in own):
        return
    for name, value in held.items():
        (layer._parameters if name in layer._parameters else layer._buffers)[name] = value  # type: ignore[assignment]
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._modules[name] = layer
    node.op, node.target, node.args, node.kwargs = (
        "call_module",
        path,
        (given["indices" if "indices" in given else "input"],),
        {},
    )


_SLOTS = ("weight", "bias", "running_mean", "running_var")


def _conv(kind: type[nn.Module]) -> Callable[[Tensor, dict[str, Any]], nn.Module]:
    def make(w: Tensor, given: dict[str, Any]) -> nn.Module:
        own = {k: tuple(given[k]) for k in ("stride", "padding", "dilation")}
        bias, groups = given["bias"] is not None, given["groups"]
        return kind(w.size(1) * groups, w.size(0), tuple(w.shape[2:]), groups=groups, bias=bias, **own)

    return make


def _batch_norm(w: Tensor, given: dict[str, Any]) -> nn.Module:
    kind = _BATCH_NORMS.get(given["input"].meta["val"].dim())  # each layer takes inputs of certain dimensions only
    if given["training"] or kind is None:
        raise ValueError("batch statistics, or an input that no layer takes")
    return kind(w.numel(), eps=given["eps"], momentum=given["momentum"])


_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _layer_norm(w: Tensor, given: dict[str, Any]) -> nn.Module:
    return nn.LayerNorm(tuple(given["normalized_shape"]), given["eps"], bias=given["bias"] is not None)


def _embedding(w: Tensor, given: dict[str, Any]) -> nn.Module:
    return nn.Embedding(w.size(0), w.size(1), None if given["padding_idx"] < 0 else given["padding_idx"])


# aten op -> the layer for its weight and arguments
_LAYERS: dict[str, Callable[[Tensor, dict[str, Any]], nn.Module]] = {
    "linear.default": lambda w, given: nn.Linear(w.size(1), w.size(0), given["bias"] is not None),
    "embedding.default": _embedding,
    "layer_norm.default": _layer_norm,
    "conv1d.default": _conv(nn.Conv1d),
    "conv2d.default": _conv(nn.Conv2d),
    "conv3d.default": _conv(nn.Conv3d),
    "batch_norm.default": _batch_norm,
}


def _as_sequence(module: fx.GraphModule, path: str, owner: nn.Module) -> None:
    """Call the container instead of its items if every use in the graph calls all of them one after the other."""
    parts = [f"{path}.{number}" for number in range(len(owner._modules))]
    inside = [n for n in module.graph.nodes if str(n.target).startswith(path + ".") and n.op in _BY_PATH]
    rows = [inside[at : at + len(parts)] for at in range(0, len(inside), len(parts))]
    if not inside or not all(_in_a_row(row, parts) for row in rows):
        return
    parent, _, name = path.rpartition(".")
    children: Any = owner._modules.values()
    module.get_submodule(parent)._modules[name] = nn.Sequential(*children)
    for row in rows:
        row[-1].target, row[-1].args = path, row[0].args
        for node in reversed(row[:-1]):
            module.graph.erase_node(node)


_BY_PATH = ("call_module", "get_attr")


def _in_a_row(row: list[fx.Node], parts: list[str]) -> bool:
    chained = all(
        after.args == (before,) and list(before.users) == [after] and before.next is after
        for before, after in itertools.pairwise(row)
    )
    alone = len(row[0].args) == 1 and not any(n.kwargs or n.op != "call_module" for n in row)
    return [str(n.target) for n in row] == parts and chained and alone
