"""Evaluating: modules in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def reproducible() -> Iterator[None]:
    """The same random numbers each time, and attention as it is written; afterwards all is as it was.

    torch's fast path for attention in evaluation gives zeros where padding is masked, which no graph of its ops does.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=gpus):
            reseed()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def reseed() -> None:
    """Seed the generators that can be in use. torch.manual_seed would wake up, or remember, those that are not."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """The modules in evaluation mode; afterwards each part's training flag is as it was.

    The flags are set one by one, as `.eval()` of a graph module that torch.export made raises.
    """
    modes = {part: part.training for module in modules for part in module.modules() if part.training}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
