"""What tests of the benchmarks share."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _networks_are_imported_anew() -> Iterator[None]:
    """Forgets networks that a test imported from a folder of its own: another test's may have the same name."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        origin = getattr(getattr(sys.modules[name], "__spec__", None), "origin", None)
        if origin and "pytest-of-" in origin:
            del sys.modules[name]
