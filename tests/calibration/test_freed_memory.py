"""Freed memory: reused while batches run and returned afterwards, unless the user has settings of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fxmerge.calibration import freed_memory
from fxmerge.calibration.freed_memory import reusing_memory

SCRIPT = """
import resource, sys, torch
from fxmerge.calibration.freed_memory import _glibc, reusing_memory
if _glibc() is None:
    sys.exit(9)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
mapped = faults()
with reusing_memory(torch.nn.Linear(2, 2), batches=True):
    kept, inside = faults(), resident()
print(mapped, kept, inside - resident())
"""


def test_freed_memory_is_reused_and_then_returned() -> None:
    """The system clears the pages of 20 tensors of 64 MiB one after another, or of the first few."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    if done.returncode == 9:
        pytest.skip("not the C library of Linux")
    mapped, kept, returned = map(int, done.stdout.split())
    assert kept < mapped / 2
    assert returned > 2**25


class Library:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def mallopt(self, *setting: int) -> None:
        self.calls.append(setting)

    malloc_trim = mallopt


def test_settings_are_put_back_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library, model = Library(), torch.nn.Linear(2, 2)
    monkeypatch.setattr(freed_memory, "_glibc", lambda: library)
    with pytest.raises(KeyError), reusing_memory(model, batches=True):
        assert library.calls == [(-4, 0), (-1, -1)]
        raise KeyError
    assert library.calls[2:] == [(-4, 65536), (-3, 2**25), (-1, 2**26), (0,)]
    library.calls.clear()
    with reusing_memory(model, batches=False):
        pass
    assert library.calls == []


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert freed_memory._glibc() is None
