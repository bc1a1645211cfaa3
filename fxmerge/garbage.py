"""Garbage: while fxmerge works, Python's collector looks at what fxmerge made, and not at all that was there before.

A merge makes many small objects, so that a full collection comes once or twice; with torch imported it walks some
million older objects, which takes as long as the merge of a small model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def older_left_alone() -> Iterator[None]:
    """Meanwhile no collection walks the objects that are there now. Where the user froze some, nothing is changed."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
