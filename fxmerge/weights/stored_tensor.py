"""Tensors whose values are kept elsewhere, in a file or divided among processes, and fetched when an op needs them.

A `StoredTensor` has a shape and a dtype but no values of its own. An op on it fetches the values, uses them, and frees
them; only the tensor fetched last is kept, since the next op often needs the same one. An op that writes in place
stores the new values in a new place, never in that of the original. Copies share a place until one of them is written.
So any code that goes from layer to layer holds one layer in memory at a time, even if it was not written for this.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.errors import FxMergeError

SMALL = 2**16  # bytes; smaller tensors are held in memory


class Region(Protocol):
    """The place of a tensor's values, which never change."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def read(self) -> Tensor:
        """The values, on the device, as a tensor that the caller may keep but not write."""


class Store(Protocol):
    """Where new values go."""

    def write(self, value: Tensor) -> Region:
        """Stores values, and returns their place. They are deleted with the last reference to it."""


class Backing:
    """The current place of a tensor's values, shared by the tensor, its aliases and its transposes."""

    last: tuple[Region, torch.dtype, Tensor] | None = None  # the values read last, by any instance

    def __init__(self, region: Region, dtype: torch.dtype, store: Store) -> None:
        self.region, self.dtype, self.store = region, dtype, store

    def copy(self) -> Backing:
        """An independent backing with the same values, which share a place until one of the two is written."""
        return Backing(self.region, self.dtype, self.store)

    def read(self) -> Tensor:
        known = Backing.last
        if known is not None and known[0] is self.region and known[1] is self.dtype:
            return known[2]
        del known
        Backing.last = None  # freed before the next is read, so that memory holds only one
        value = self.region.read().to(self.dtype)
        Backing.last = self.region, self.dtype, value
        return value

    def write(self, value: Tensor) -> None:
        self.region = self.store.write(value)
        Backing.last = self.region, self.dtype, value


_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class StoredTensor(Tensor):
    """A tensor whose values are elsewhere. Views of it are for reading only: a write to a view is lost."""

    backing: Backing
    transposed: bool  # whether this is the transpose of the stored tensor, which autograd saves for linear layers

    @staticmethod
    def __new__(cls, backing: Backing, requires_grad: bool = False, transposed: bool = False) -> StoredTensor:
        meta = torch.empty(backing.region.shape, dtype=backing.dtype, device="meta")
        like = meta.t() if transposed else meta
        made: StoredTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            like.stride(),
            dtype=backing.dtype,
            device=backing.region.device,
            requires_grad=requires_grad,
        )
        made.backing, made.transposed = backing, transposed
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, StoredTensor):
            if func in _ALIASES:
                return StoredTensor(first.backing, transposed=first.transposed)
            if func is torch.ops.aten.t.default and first.dim() == 2:
                return StoredTensor(first.backing, transposed=not first.transposed)
            if func is torch.ops.aten.clone.default and not first.transposed:
                return StoredTensor(first.backing.copy())
        kwargs = kwargs or {}
        written = [v for v in _written(func, args, kwargs) if isinstance(v, StoredTensor)]
        numbers: dict[Backing, Tensor] = {}  # the values as they are stored
        values: dict[StoredTensor, Tensor] = {}

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, StoredTensor):
                return leaf
            if leaf not in values:
                whole = numbers.setdefault(leaf.backing, leaf.backing.read())
                values[leaf] = whole.t() if leaf.transposed else whole
            return values[leaf]

        call = pytree.tree_map(value, (args, kwargs))
        if written:  # the values in memory will differ from those that are stored
            Backing.last = None
        out = func(*call[0], **call[1])
        for target in written:
            target.backing.write(numbers[target.backing])
            out = pytree.tree_map(lambda leaf: target if leaf is values[target] else leaf, out)  # noqa: B023
        return out

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not (isinstance(value, StoredTensor) and value.backing is self.backing):
            raise FxMergeError(
                "weights on disk, or divided among processes, cannot change their dtype or device; use "
                "fxmerge.in_memory(module) first"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensor:
        if id(self) not in memo:
            made = StoredTensor(self.backing.copy(), self.requires_grad, self.transposed)
            if isinstance(self, torch.nn.Parameter):
                made._is_param = True
            memo[id(self)] = made
        found: StoredTensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FxMergeError("weights on disk, or divided among processes, cannot be pickled; use result.save(folder)")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StoredTensor({tuple(self.shape)}, {self.dtype}, {self.backing.region})"


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an op writes in place."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [given[name] for name in written if name in given]


def beside(old: Tensor, value: Tensor) -> Tensor:
    """The value as a replacement of the tensor `old`: stored where that one is, unless the value is small."""
    if not isinstance(old, StoredTensor) or isinstance(value, StoredTensor) or value.nbytes < SMALL:
        return value
    return StoredTensor(Backing(old.backing.store.write(value), value.dtype, old.backing.store))


def raw(value: Tensor) -> Any:
    """The bytes of a tensor as a numpy array, without a copy where the tensor is contiguous and on the CPU."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def has_stored_tensors(model: torch.nn.Module) -> bool:
    """Returns whether any parameter of a module is on disk, or divided among processes."""
    return any(isinstance(value, StoredTensor) for value in model.parameters())
