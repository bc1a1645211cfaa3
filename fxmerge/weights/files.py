"""Writes files and folders atomically: under a temporary name in the same place, then renamed. No pickle."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fxmerge.errors import FxMergeError
from fxmerge.weights.file_regions import TYPE_NAMES
from fxmerge.weights.stored_tensor import raw


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Writes a file: `fill` writes a temporary file in the same folder, which is then renamed to `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        fill(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    write(path, lambda there: there.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, tensor by tensor, so that of tensors on disk one at a time is in memory.

    A tensor with several names is written under each of them. Tensors are sorted by the size of their dtype, largest
    first, as in the safetensors library. Raises FxMergeError for a dtype that the format does not have.
    """
    odd = sorted(name for name, value in tensors.items() if value.dtype not in TYPE_NAMES)
    if odd:
        raise FxMergeError(f"{odd[0]} is {tensors[odd[0]].dtype}, which safetensors cannot hold; convert it first")
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        kind, shape = TYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def fill(there: Path) -> None:
        with there.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(memoryview(raw(tensors[name])))

    write(path, fill)


def write_folder(folder: Path, known: Collection[str], fill: Callable[[Path], object]) -> None:
    """Writes a folder: `fill` fills a temporary folder beside it, which then replaces `folder`.

    On Linux the old folder and the new one are exchanged atomically, so that the name always refers to one of them.
    On other systems the old folder is renamed first.

    known: the names that fxmerge writes; a folder with any other file is not replaced

    Raises FxMergeError where `folder` is a file, or holds a file that is not in `known`.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise FxMergeError(f"{folder} is a file; give a folder")
    strange = sorted({p.name for p in folder.iterdir()} - {*known, "__pycache__"}) if folder.exists() else []
    if strange:
        raise FxMergeError(f"{folder} holds {strange[0]}, which fxmerge did not write; give a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        fill(aside)
        os.chmod(aside, 0o755)
        if not folder.exists():
            os.rename(aside, folder)
        elif not _exchange(aside, folder):
            _step_aside(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders atomically. Returns False where the system cannot do that."""
    if sys.platform != "linux":  # on Windows a process has no library of its own symbols to open
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _step_aside(new: Path, folder: Path) -> None:
    """Renames the old folder, then the new one; if that fails, the old one is put back."""
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    os.replace(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
