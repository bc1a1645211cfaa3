"""Parameters of which some are measured with the slow tests only."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(kept: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """The values as parameters; those that are not among `kept` are slow."""
    fast = list(kept)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
