"""Keeps freed memory in the process while batches run.

The C library of Linux (glibc) maps large blocks one by one and unmaps them when they are freed, so that the system
clears every page of every activation again. Elementwise ops then take up to three times as long. While batches run,
freed blocks are reused instead (see the manual page of mallopt). Nothing is changed where another C library is used,
where the user has set these values, or where weights are on disk, which is for models that need little memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fxmerge.weights.disk_tensor import has_disk_tensors

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # parameters of mallopt
_MOST = 65536  # blocks that are mapped one by one, by default
_LARGE = 2**25  # bytes of a block that is always mapped, once a process has freed one as large


@contextmanager
def reusing_memory(model: nn.Module, batches: bool) -> Iterator[None]:
    """Keeps freed memory for later tensors, if batches will run; on exit it is given back to the system."""
    library = _glibc()
    if library is None or not batches or has_disk_tensors(model):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MOST)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
