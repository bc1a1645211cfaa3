"""Places of tensors in safetensors files, and temporary files for those that are written.

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

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxmerge.errors import FxMergeError
from fxmerge.weights import stored_tensor
from fxmerge.weights.stored_tensor import Backing, StoredTensor, raw
from fxmerge.weights.unreadable import unreadable

DTYPES: dict[str, torch.dtype] = {  # the names of types in safetensors files
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
_CPU = torch.device("cpu")


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

    @property
    def device(self) -> torch.device:
        return _CPU

    def __str__(self) -> str:
        return f"in {self.path}"

    def read(self) -> Tensor:
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.nbytes >= _TRIMMED:
            _trim()
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
        return (
            region.read().to(dtype)
            if region.nbytes < stored_tensor.SMALL
            else StoredTensor(Backing(region, dtype, spool))
        )

    return {name: tensor(region, (dtypes or {}).get(name, region.dtype)) for name, region in found.items()}
