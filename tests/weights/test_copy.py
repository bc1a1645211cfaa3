"""Copies of models whose fields hold what `copy.deepcopy` refuses."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge


class Settings:
    """A Python module and a lock, as in the configuration of some detectors."""

    def __init__(self) -> None:
        self.maths, self.lock = math, threading.Lock()


def counted() -> Iterator[int]:
    yield from range(3)


HELD = {"settings": Settings, "a stream in a list": lambda: [sys.stdout, {"lock": threading.Lock()}], "steps": counted}


class Holder(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.held, self.list = held, [1, 2]
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.inner.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * math.sqrt(2.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", HELD)
def test_what_cannot_be_copied_is_shared(kind: str) -> None:
    model, x = Holder(HELD[kind]()).eval(), torch.randn(2, 3, 8, 8)
    result = fxmerge.merge(model, x, ratio=0.5, refit="none")
    own = result.model
    assert isinstance(own, Holder) and own.inner[0].out_channels == 4 and model.inner[0].out_channels == 8
    torch.testing.assert_close(own(x), result.module(x))
    assert own.list is not model.list
    if kind == "settings":
        assert own.held is not model.held and own.held.lock is model.held.lock
    elif kind == "steps":
        assert own.held is model.held
