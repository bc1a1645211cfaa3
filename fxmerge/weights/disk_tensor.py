"""Stored tensors: weights that stay in a file and are read when an op needs them.

A `Stored` tensor has a shape and a dtype but no memory. Whatever op meets it reads it, works on the numbers, and lets
go of them; the tensor read last is kept, as the next op often wants the same. What an op writes in place goes to a
temporary file, never to the file that was given, and copies share what they have in common until one is written. So a
stage that goes from layer to layer holds one layer, whether it was written with this in mind or not.

Files are read, not mapped: a mapped file counts as memory of the process, and limits on it would not tell anything.
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

SMALL = 2**16  # bytes; tensors that are smaller are held in memory
HOLE = 2**20  # bytes that are worth giving back
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc has it
_CPU = torch.device("cpu")
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Slot:
    """Where in a file a tensor's numbers stand. They never change."""

    path: Path
    stamp: tuple[int, ...]  # of the file, when it was opened
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        # pages of their own, which the system has back at once, where malloc would keep holes of many sizes
        room, done = memoryview(mmap.mmap(-1, self.nbytes, **_PRIVATE)), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise OSError("the file has changed since it was opened")
                file.seek(self.offset)
                while done < len(room):  # one read gives 2 GiB at most
                    count = file.readinto(room[done:])
                    if not count:
                        raise OSError("the file is too short")
                    done += count
        except OSError as error:
            raise FxMergeError(f"weights cannot be read from {self.path}: {error}") from error
        return torch.frombuffer(room, dtype=self.dtype).view(self.shape)


class Spool:
    """A temporary folder for tensors; each leaves the disk with the last that refers to it."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fxmerge-")
        self.count = 0

    def write(self, value: Tensor) -> Slot:
        self.count += 1
        path = Path(self.folder.name, str(self.count))
        try:
            with path.open("wb") as file:
                file.write(memoryview(raw(value)))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise FxMergeError(f"{error} in {path.parent}; let TMPDIR name a folder with more room") from error
        slot = Slot(path, _stamp(path.stat()), 0, value.dtype, tuple(value.shape))
        weakref.finalize(slot, _forget, self, path)
        return slot


def _trim() -> None:
    """Give back what malloc keeps: large tensors that have gone leave holes between small ones that live on."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _forget(spool: Spool, path: Path) -> None:
    path.unlink(missing_ok=True)


class Cell:
    """What all names of one stored tensor share: where its numbers are at present."""

    last: tuple[Slot, torch.dtype, Tensor] | None = None  # the one read last, of all

    def __init__(self, slot: Slot, dtype: torch.dtype, spool: Spool) -> None:
        self.slot, self.dtype, self.spool = slot, dtype, spool

    def copy(self) -> Cell:
        """Another of the same numbers, until one is written."""
        return Cell(self.slot, self.dtype, self.spool)

    def read(self) -> Tensor:
        known = Cell.last
        if known is not None and known[0] is self.slot and known[1] is self.dtype:
            return known[2]
        del known
        Cell.last = None  # never two of them for the cache's sake
        if self.slot.nbytes >= HOLE:
            _trim()
        value = self.slot.read().to(self.dtype)
        Cell.last = self.slot, self.dtype, value
        return value

    def write(self, value: Tensor) -> None:
        self.slot = self.spool.write(value)
        Cell.last = self.slot, self.dtype, value


class Stored(Tensor):
    """A tensor whose numbers are in a file. Views of it are for reading only: what is written to one is lost."""

    cell: Cell
    turned: bool  # is it the transpose of what is in the file? Of a linear layer's weight autograd keeps that

    @staticmethod
    def __new__(cls, cell: Cell, requires_grad: bool = False, turned: bool = False) -> Stored:
        meta = torch.empty(cell.slot.shape, dtype=cell.dtype, device="meta")
        like = meta.t() if turned else meta
        made: Stored = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=cell.dtype, device=_CPU, requires_grad=requires_grad
        )
        made.cell, made.turned = cell, turned
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Stored):
            if func in _SAME:
                return Stored(first.cell, turned=first.turned)
            if func is torch.ops.aten.t.default and first.dim() == 2:
                return Stored(first.cell, turned=not first.turned)
            if func is torch.ops.aten.clone.default and not first.turned:
                return Stored(first.cell.copy())
        kwargs = kwargs or {}
        written = [v for v in _written(func, args, kwargs) if isinstance(v, Stored)]
        numbers: dict[Cell, Tensor] = {}  # as they are in the files
        values: dict[Stored, Tensor] = {}

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Stored):
                return leaf
            if leaf not in values:
                whole = numbers.setdefault(leaf.cell, leaf.cell.read())
                values[leaf] = whole.t() if leaf.turned else whole
            return values[leaf]

        call = pytree.tree_map(value, (args, kwargs))
        if written:  # what was read will not be what is in the file
            Cell.last = None
        out = func(*call[0], **call[1])
        for target in written:
            target.cell.write(numbers[target.cell])
            out = pytree.tree_map(lambda leaf: target if leaf is values[target] else leaf, out)  # noqa: B023
        return out

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not (isinstance(value, Stored) and value.cell is self.cell):
            raise FxMergeError(
                "weights that are on disk keep their type and place; use fxmerge.in_memory(module) first"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        if id(self) not in memo:
            made = Stored(self.cell.copy(), self.requires_grad, self.turned)
            if isinstance(self, torch.nn.Parameter):
                made._is_param = True
            memo[id(self)] = made
        found: Stored = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FxMergeError("weights that are on disk cannot be pickled; use result.save(folder)")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Stored({tuple(self.shape)}, {self.dtype}, in {self.cell.slot.path})"


_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The operands that an op writes in place."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [given[name] for name in written if name in given]


def beside(old: Tensor, value: Tensor) -> Tensor:
    """A tensor that takes the place of another: on disk if that one is."""
    if not isinstance(old, Stored) or isinstance(value, Stored) or value.nbytes < SMALL:
        return value
    return Stored(Cell(old.cell.spool.write(value), value.dtype, old.cell.spool))


def raw(value: Tensor) -> Any:
    """The bytes of a tensor, as a numpy array; of its own memory where it is contiguous and on the CPU."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def stored(model: torch.nn.Module) -> bool:
    """Are weights of this module on disk?"""
    return any(isinstance(value, Stored) for value in model.parameters())


def slots(path: Path) -> dict[str, Slot]:
    """Where each tensor of a safetensors file stands. Raises FxMergeError for any other file, or a damaged one."""
    try:
        with safe_open(path, framework="np"):  # checks sizes and offsets
            pass
        with path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise FxMergeError(f"cannot read weights from {path}: {error}") from error
    header.pop("__metadata__", None)
    strange = sorted({e["dtype"] for e in header.values()} - set(DTYPES))
    if strange:
        raise FxMergeError(f"{path} holds tensors of type {strange[0]}, which torch does not have")
    return {
        name: Slot(path, stamp, 8 + length + e["data_offsets"][0], DTYPES[e["dtype"]], tuple(e["shape"]))
        for name, e in header.items()
    }


def left_in(found: Mapping[str, Slot], dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    """Tensors that stay in their files, and are of these types when read; those below SMALL are read."""
    spool = Spool()

    def tensor(slot: Slot, dtype: torch.dtype) -> Tensor:
        return slot.read().to(dtype) if slot.nbytes < SMALL else Stored(Cell(slot, dtype, spool))

    return {name: tensor(slot, (dtypes or {}).get(name, slot.dtype)) for name, slot in found.items()}
