"""Weights: reading and rebuilding a module's parameters by path. Helpers of the stages that write."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxmerge.weights.disk_tensor import beside


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


def fetch_bias(node: fx.Node, path: str) -> None:
    """Give a call of a layer's function, as F.conv2d, the parameter at `path` for its bias."""
    with node.graph.inserting_before(node):
        fetched = node.graph.get_attr(path)
    node.args = (*node.args[:2], fetched, *node.args[3:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
