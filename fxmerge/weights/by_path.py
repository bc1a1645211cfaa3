"""A module's parameters and buffers by path: read, replaced and added."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxmerge.weights.memory_format import in_format
from fxmerge.weights.stored_tensor import beside


def at(module: nn.Module, path: str) -> Tensor:
    """A module's parameter or buffer by path."""
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value


class Weights:
    """A module's parameters and buffers by path, to be replaced. A tensor with several paths stays one tensor.

    shared: the ids of tensors that belong to another module as well; `own` copies such a tensor before it is written
    """

    def __init__(self, module: nn.Module, shared: frozenset[int] = frozenset()) -> None:
        self.module, self.shared = module, shared
        self.owners = dict(module.named_modules(remove_duplicate=False))
        self.holders: dict[int, list[tuple[dict[str, Any], str]]] = {}  # id of a tensor -> (dict, key) that hold it
        for owner in dict.fromkeys(self.owners.values()):
            for held in (owner._parameters, owner._buffers, owner.__dict__):
                for name, value in held.items():
                    if isinstance(value, Tensor):
                        self.holders.setdefault(id(value), []).append((held, name))

    def __getitem__(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        value: Tensor = getattr(self.owners[owner], name)
        return value

    def find(self, path: str) -> Tensor | None:
        """The tensor at a path, or None where there is none."""
        owner, _, name = path.rpartition(".")
        value = getattr(self.owners.get(owner), name, None)
        return value if isinstance(value, Tensor) else None

    def tie(self, old: Tensor, value: Tensor) -> None:
        """Puts a tensor that the module already has in the places of another."""
        holders = self.holders.pop(id(old))
        for held, name in holders:
            held[name] = value
        self.holders[id(value)] += holders

    def put(self, path: str, value: Tensor) -> Tensor:
        """Replaces a tensor wherever the module holds it; if the old tensor is on disk, the new one is too."""
        return self.replace(path, beside(self[path], value))

    def replace(self, path: str, value: Tensor) -> Tensor:
        """Replaces a tensor by exactly this one, wherever the module holds it."""
        return self._replace(self[path], value)

    def own(self, path: str) -> Tensor:
        """The tensor at a path, which is now safe to write in place: a shared one is replaced by a copy."""
        value = self[path]
        return self.put(path, value.detach().clone()) if id(value) in self.shared else value

    def own_all(self) -> None:
        """Replaces every tensor that is still shared by a copy."""
        for number, holders in list(self.holders.items()):
            if number in self.shared:
                held, name = holders[0]
                self._replace(held[name], held[name].detach().clone())

    def add(self, path: str, value: Tensor, requires_grad: bool) -> None:
        """Adds a parameter where the module has none, or None."""
        owner, _, name = path.rpartition(".")
        held = self.module.get_submodule(owner)._parameters
        fresh = nn.Parameter(value, requires_grad=requires_grad)
        held[name] = fresh
        self.holders[id(fresh)] = [(held, name)]

    def _replace(self, old: Tensor, value: Tensor) -> Tensor:
        value = in_format(value, old)
        fresh = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        holders = self.holders.pop(id(old))
        for held, name in holders:
            held[name] = fresh
        self.holders[id(fresh)] = holders
        return fresh


def fetch_bias(node: fx.Node, path: str) -> None:
    """Makes the parameter at `path` the bias of a functional call of a layer, such as F.conv2d."""
    with node.graph.inserting_before(node):
        fetched = node.graph.get_attr(path)
    node.args = (*node.args[:2], fetched, *node.args[3:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
