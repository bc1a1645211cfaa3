"""Tensors on disk: weights that stay in a file and are read when an op needs them.

A `DiskTensor` has a shape and a dtype but holds no values in memory. An op on it reads the values, uses them, and
frees them; only the tensor read last is kept, since the next op often needs the same one. An op that writes in place
writes to a temporary file, never to the original file. Copies share a file until one of them is written. So any code
that goes from layer to layer holds one layer in memory at a time, even if it was not written for this.

Files are read, not mapped, since the pages of a mapped file would count towards the memory of the process.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.errors import FxMergeError
from fxmerge.weights.unreadable import unreadable

SMALL = 2**16  # bytes; smaller tensors are held in memory
DTYPES: dict[str, torch.dtype] = {  # the names of types in safetensors files
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


@dataclass(frozen=True, eq=False)
class FileRegion:
    """The place in a file of a tensor's values, which never change."""

    path: Path
    stamp: tuple[int, ...]  # identifies the file and its state when it was opened
    offset: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        # pages of its own: they return to the system at once, whereas malloc would keep gaps of many sizes
        room, done = memoryview(mmap.mmap(-1, self.nbytes, **_PRIVATE)), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise OSError("the file has changed since it was opened")
                file.seek(self.offset)
                while done < len(room):  # one read returns at most 2 GiB
                    count = file.readinto(room[done:])
                    if not count:
                        raise OSError("the file is too short")
                    done += count
        except OSError as error:
            raise FxMergeError(f"cannot read weights from {self.path}: {error}") from error
        return torch.frombuffer(room, dtype=self.dtype).view(self.shape)


class Spool:
    """A temporary folder for tensors. A file is deleted when the last reference to its `FileRegion` is."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fxmerge-")
        self.count = 0

    def write(self, value: Tensor) -> FileRegion:
        self.count += 1
        path = Path(self.folder.name, str(self.count))
        try:
            with path.open("wb") as file:
                file.write(memoryview(raw(value)))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise FxMergeError(
                f"cannot write to {path.parent}: {error}; set TMPDIR to a folder with more free space"
            ) from error
        region = FileRegion(path, _stamp(path.stat()), 0, value.dtype, tuple(value.shape))
        weakref.finalize(region, _forget, self, path)
        return region


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _forget(spool: Spool, path: Path) -> None:  # the argument keeps the folder until its last file is deleted
    path.unlink(missing_ok=True)


_TRIMMED = 2**20  # bytes; before a tensor of this size is read, free memory is returned to the system
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc only


def _trim() -> None:
    """Returns free memory to the system. malloc keeps the gaps that freed large tensors leave between small ones."""
    if _malloc_trim is not None:
        _malloc_trim(0)


class Backing:
    """The current file region of a tensor, shared by the tensor, its aliases and its transposes."""

    last: tuple[FileRegion, torch.dtype, Tensor] | None = None  # the values read last, by any instance

    def __init__(self, region: FileRegion, dtype: torch.dtype, spool: Spool) -> None:
        self.region, self.dtype, self.spool = region, dtype, spool

    def copy(self) -> Backing:
        """An independent backing with the same values, which share a file until one of the two is written."""
        return Backing(self.region, self.dtype, self.spool)

    def read(self) -> Tensor:
        known = Backing.last
        if known is not None and known[0] is self.region and known[1] is self.dtype:
            return known[2]
        del known
        Backing.last = None  # freed before the next is read, so that memory holds only one
        if self.region.nbytes >= _TRIMMED:
            _trim()
        value = self.region.read().to(self.dtype)
        Backing.last = self.region, self.dtype, value
        return value

    def write(self, value: Tensor) -> None:
        self.region = self.spool.write(value)
        Backing.last = self.region, self.dtype, value


_CPU = torch.device("cpu")
_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class DiskTensor(Tensor):
    """A tensor whose values are in a file. Views of it are for reading only: a write to a view is lost."""

    backing: Backing
    transposed: bool  # whether this is the transpose of the tensor in the file, which autograd saves for linear layers

    @staticmethod
    def __new__(cls, backing: Backing, requires_grad: bool = False, transposed: bool = False) -> DiskTensor:
        meta = torch.empty(backing.region.shape, dtype=backing.dtype, device="meta")
        like = meta.t() if transposed else meta
        made: DiskTensor = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=backing.dtype, device=_CPU, requires_grad=requires_grad
        )
        made.backing, made.transposed = backing, transposed
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, DiskTensor):
            if func in _ALIASES:
                return DiskTensor(first.backing, transposed=first.transposed)
            if func is torch.ops.aten.t.default and first.dim() == 2:
                return DiskTensor(first.backing, transposed=not first.transposed)
            if func is torch.ops.aten.clone.default and not first.transposed:
                return DiskTensor(first.backing.copy())
        kwargs = kwargs or {}
        written = [v for v in _written(func, args, kwargs) if isinstance(v, DiskTensor)]
        numbers: dict[Backing, Tensor] = {}  # the values as they are in the files
        values: dict[DiskTensor, Tensor] = {}

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, DiskTensor):
                return leaf
            if leaf not in values:
                whole = numbers.setdefault(leaf.backing, leaf.backing.read())
                values[leaf] = whole.t() if leaf.transposed else whole
            return values[leaf]

        call = pytree.tree_map(value, (args, kwargs))
        if written:  # the values in memory will differ from those in the file
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
        if not (isinstance(value, DiskTensor) and value.backing is self.backing):
            raise FxMergeError(
                "weights on disk cannot change their dtype or device; use fxmerge.in_memory(module) first"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskTensor:
        if id(self) not in memo:
            made = DiskTensor(self.backing.copy(), self.requires_grad, self.transposed)
            if isinstance(self, torch.nn.Parameter):
                made._is_param = True
            memo[id(self)] = made
        found: DiskTensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FxMergeError("weights on disk cannot be pickled; use result.save(folder)")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DiskTensor({tuple(self.shape)}, {self.dtype}, in {self.backing.region.path})"


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an op writes in place."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [given[name] for name in written if name in given]


def beside(old: Tensor, value: Tensor) -> Tensor:
    """The value as a replacement of the tensor `old`: on disk if that one is, unless the value is small."""
    if not isinstance(old, DiskTensor) or isinstance(value, DiskTensor) or value.nbytes < SMALL:
        return value
    return DiskTensor(Backing(old.backing.spool.write(value), value.dtype, old.backing.spool))


def raw(value: Tensor) -> Any:
    """The bytes of a tensor as a numpy array, without a copy where the tensor is contiguous and on the CPU."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def has_disk_tensors(model: torch.nn.Module) -> bool:
    """Returns whether any parameter of a module is on disk."""
    return any(isinstance(value, DiskTensor) for value in model.parameters())


def regions(path: Path) -> dict[str, FileRegion]:
    """The region of each tensor of a safetensors file, by name. Raises FxMergeError if the file cannot be read."""
    try:
        with safe_open(path, framework="np"):  # checks sizes and offsets
            pass
        with path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error) from error
    header.pop("__metadata__", None)
    strange = sorted({e["dtype"] for e in header.values()} - set(DTYPES))
    if strange:
        raise FxMergeError(f"{path} holds tensors of type {strange[0]}, which torch does not have")
    return {
        name: FileRegion(path, stamp, 8 + length + e["data_offsets"][0], DTYPES[e["dtype"]], tuple(e["shape"]))
        for name, e in header.items()
    }


def open_tensors(found: Mapping[str, FileRegion], dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    """Tensors for regions of files, by name. Those smaller than SMALL are read now, the others when they are needed.

    dtypes: the dtype of each tensor in memory; by default, its dtype in the file
    """
    spool = Spool()

    def tensor(region: FileRegion, dtype: torch.dtype) -> Tensor:
        return region.read().to(dtype) if region.nbytes < SMALL else DiskTensor(Backing(region, dtype, spool))

    return {name: tensor(region, (dtypes or {}).get(name, region.dtype)) for name, region in found.items()}
