"""Context managers that put modules in evaluation mode and make their runs reproducible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def reproducible() -> Iterator[None]:
    """Seeds the random number generators and disables torch's attention fast path; restores both on exit.

    In evaluation mode, the fast path returns zeros where padding is masked. No graph of attention's ops does that.
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
    """Seeds the CPU generator, and CUDA's where CUDA is initialized.

    `torch.manual_seed` would also initialize, or queue a seed for, devices that are not in use.
    """
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)


def random_states() -> list[Tensor]:
    """The states of the CPU generator and, where CUDA is initialized, of CUDA's."""
    found = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found += torch.cuda.get_rng_state_all()
    return found


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts modules in evaluation mode; restores the training flag of each submodule on exit.

    The flags are set one by one, since `.eval()` raises on a graph module made by torch.export.
    """
    modes = {part: part.training for module in modules for part in module.modules() if part.training}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def with_versions() -> Iterator[None]:
    """Leaves torch.inference_mode, in which tensors have no version counters and no gradients can be computed."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield
