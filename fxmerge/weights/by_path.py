"""Weights: reading and rebuilding a module's parameters by path. Helpers of the stages that write."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxmerge.ir.labels import compact
from fxmerge.ir.records import Layer, ParamLabels
from fxmerge.methods.linalg import BITE
from fxmerge.weights.disk_tensor import beside

M = TypeVar("M", bound=nn.Module)
MUCH = 2**20  # elements; what is made of less on the way stays in the cache


def at(module: nn.Module, path: str) -> Tensor:
    """A module's parameter or buffer by path."""
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value


class Weights:
    """A module's parameters and buffers by path. A tensor that several paths name is one, and stays one.

    shared: identities of tensors that belong to another module; `own` replaces them by copies before anyone writes.
    """

    def __init__(self, module: nn.Module, shared: frozenset[int] = frozenset()) -> None:
        self.module, self.shared = module, shared
        self.owners = dict(module.named_modules(remove_duplicate=False))
        self.holders: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for owner in dict.fromkeys(self.owners.values()):
            for held in (owner._parameters, owner._buffers, owner.__dict__):
                for name, value in held.items():
                    if isinstance(value, Tensor):
                        self.holders.setdefault(id(value), []).append((held, name))

    def __getitem__(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        value: Tensor = getattr(self.owners[owner], name)
        return value

    def put(self, path: str, value: Tensor) -> Tensor:
        """Put a tensor in another's place, wherever the module holds that very tensor; on disk if that one is."""
        return self.replace(path, beside(self[path], value))

    def replace(self, path: str, value: Tensor) -> Tensor:
        """Put this very tensor in another's place."""
        old = self[path]
        fresh = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        holders = self.holders.pop(id(old))
        for held, name in holders:
            held[name] = fresh
        self.holders[id(fresh)] = holders
        return fresh

    def own(self, path: str) -> Tensor:
        """The tensor, free to be written."""
        value = self[path]
        return self.put(path, value.detach().clone()) if id(value) in self.shared else value

    def own_all(self) -> None:
        """Copy whatever is still another module's."""
        for number, holders in list(self.holders.items()):
            if number in self.shared:
                held, name = holders[0]
                old = held[name]
                copied = old.detach().clone()
                fresh = (
                    nn.Parameter(copied, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else copied
                )
                for place, key in holders:
                    place[key] = fresh

    def add(self, path: str, value: Tensor, requires_grad: bool) -> None:
        """A parameter that was not there, or was None."""
        owner, _, name = path.rpartition(".")
        held = self.module.get_submodule(owner)._parameters
        fresh = nn.Parameter(value, requires_grad=requires_grad)
        held[name] = fresh
        self.holders[id(fresh)] = [(held, name)]


def deep_copy(module: M, shared: Iterable[Tensor]) -> M:
    """`copy.deepcopy` of a module, but for tensors that stay shared.

    deepcopy takes longer than a small model's forward, nearly all of it for the many empty dicts of plain modules; so
    their fields are copied here, and deepcopy is left what else they hold, and modules that say how they are copied.
    """
    memo: dict[int, Any] = {id(t): t for t in shared}
    modules = list(module.modules())
    classes = {cls: _plain(cls) for cls in {type(m) for m in modules}}
    plain = [m for m in modules if classes[type(m)] and "__deepcopy__" not in m.__dict__]
    for m in plain:
        memo[id(m)] = type(m).__new__(type(m))
    for m in plain:
        state: dict[str, Any] = m.__getstate__()  # type: ignore[no-untyped-call]
        copied = {name: v if type(v) in _ATOMS else _field(v, memo) for name, v in state.items()}
        memo[id(m)].__setstate__(copied)
    return copy.deepcopy(module, memo)


def _plain(cls: type[nn.Module]) -> bool:
    """Does deepcopy copy these modules field by field, and nothing else?"""
    own_ways = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
    return (
        not hasattr(cls, "__deepcopy__")
        and cls not in copyreg.dispatch_table
        and all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in own_ways)
        and not any("__slots__" in base.__dict__ for base in cls.__mro__)
    )


def _field(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) is tuple and all(type(v) in _ATOMS for v in value):
        return value
    if id(value) in memo or not (type(value) in (dict, OrderedDict) or (type(value) in (list, set) and not value)):
        return copy.deepcopy(value, memo)
    copied = memo[id(value)] = type(value)()
    if value:
        for name, one in value.items():
            copied[name if type(name) in _ATOMS else _field(name, memo)] = (
                one if type(one) in _ATOMS else _field(one, memo)
            )
    return copied


_ATOMS = frozenset((int, float, bool, str, type(None)))


def sharing_copy(module: fx.GraphModule) -> tuple[fx.GraphModule, Weights]:
    """A copy of a module that still shares all of its tensors, and the weights to make them its own one by one."""
    held = (d for m in module.modules() for d in (m._parameters, m._buffers, m.__dict__))
    tensors = [v for values in held for v in values.values() if isinstance(v, Tensor)]
    copied = deep_copy(module, tensors)
    return copied, Weights(copied, frozenset(id(t) for t in tensors))


# module attribute -> axis of the weight that it tells the size of
_SIZES: dict[str, int] = {
    "in_features": 1,
    "out_features": 0,
    "num_features": 0,
    "num_parameters": 0,
    "num_channels": 0,
    "num_embeddings": 0,
    "embedding_dim": 1,
}


def resize(owner: nn.Module, sized: Tensor, groups: int, transposed: bool) -> None:
    """Right in_channels, num_features, normalized_shape: what a layer keeps of its weight's sizes."""
    held: dict[str, Any] = owner.__dict__
    for attribute, axis in _SIZES.items():
        if isinstance(getattr(owner, attribute, None), int) and axis < sized.dim():
            held[attribute] = sized.size(axis)
    into, out = (0, 1) if transposed else (1, 0)
    if hasattr(owner, "in_channels") and hasattr(owner, "out_channels"):
        held["groups"] = groups
        held["in_channels"] = sized.size(into) * (1 if transposed else groups)
        held["out_channels"] = sized.size(out) * (groups if transposed else 1)
    if hasattr(owner, "normalized_shape"):
        held["normalized_shape"] = tuple(sized.shape)


def fetch_bias(node: fx.Node, path: str) -> None:
    """Give a call of a layer's function, as F.conv2d, the parameter at `path` for its bias."""
    with node.graph.inserting_before(node):
        fetched = node.graph.get_attr(path)
    node.args = (*node.args[:2], fetched, *node.args[3:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}


def columns(weight: Tensor, layer: Layer) -> Tensor:
    """A reader's weight with one row for each input place: (groups * in/groups, out/groups * kernel)."""
    if layer.transposed:
        return weight.flatten(1)
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, out/groups, in/groups, *kernel)
    return split.movedim(2, 1).reshape(layer.groups * weight.size(1), -1)


def from_columns(rows: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `columns`."""
    if layer.transposed:
        return rows.reshape(like.shape)
    split = rows.reshape(layer.groups, like.size(1), like.size(0) // layer.groups, *like.shape[2:])
    return split.movedim(1, 2).reshape(like.shape)


def places(labels: ParamLabels) -> list[Tensor]:
    """The label tensors of one parameter."""
    return [*labels.axes.values(), *([] if labels.elements is None else [labels.elements])]


def blocks_left(layer: Layer, alive: Tensor) -> int:
    """How many of a layer's groups hold a label with `alive[label]` True."""
    labels = layer.carries if layer.reads is None else layer.reads
    if layer.groups == 1 or labels is None:
        return layer.groups
    return int(alive[labels.reshape(layer.groups, -1)].any(1).sum())


def gather(weights: Weights, labels: ParamLabels, pick: Callable[[Tensor], Tensor]) -> None:
    """Rebuild one parameter from its own entries: `pick` maps labels (m,) to the places (m',) to take, in order."""
    value = weights[labels.path].detach()
    if labels.elements is not None:
        chosen = pick(labels.elements.flatten())
        taken = torch.zeros(labels.elements.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        shape = compact(torch.arange(labels.elements.numel()).view(labels.elements.shape), taken)[0].shape
        weights.put(labels.path, value.flatten()[chosen.to(value.device)].reshape(shape))
        return
    if labels.groups == 1:
        value = _taken(value, {axis: pick(along).to(value.device) for axis, along in labels.axes.items()})
    else:
        # each block of a grouped weight takes places of its own: W (groups, out/groups, in/groups, *kernel)
        split = value.reshape(labels.groups, -1, *value.shape[1:])
        out, into = pick(labels.axes[0]), pick(labels.axes[1])
        block = torch.unique_consecutive(out // split.size(1))  # blocks may change places, or leave
        out, into = out.view(len(block), -1) % split.size(1), into.view(len(block), -1) % split.size(2)
        value = split[block[:, None, None], out[:, :, None], into[:, None, :]].flatten(0, 1)
    weights.put(labels.path, value.contiguous())


def _taken(value: Tensor, index: dict[int, Tensor]) -> Tensor:
    """A tensor's entries at these places of its axes; some rows at a time where it loses rows and columns."""
    if set(index) != {0, 1} or value.numel() < MUCH:
        for axis, places_taken in index.items():
            value = value.index_select(axis, places_taken)
        return value
    taken = value.new_empty(len(index[0]), len(index[1]), *value.shape[2:])
    for some, target in zip(torch.split(index[0], BITE), torch.split(taken, BITE), strict=True):
        torch.index_select(value.index_select(0, some), 1, index[1], out=target)
    return taken
