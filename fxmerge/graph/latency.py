"""Timing: how long one model runs beside another, and how sure one can be of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.nested import fresh

ROUNDS, SECONDS = 9, 6.0  # at least so many rounds; no new round after so long
SHORTEST = 5e-3  # seconds that the clock measures at once: shorter calls are repeated
TOLERANCE = 0.03  # of a latency


@dataclass(frozen=True)
class Timing:
    """The time of one call as a share of the original's, and of the original's own second go: median and its error."""

    share: float
    noise: float  # the standard error of a median of as many rounds, the original against itself
    seconds: float  # of the original


def compared(
    original: nn.Module, other: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], seconds: float | None = None
) -> Timing:
    """Time two modules in turns, original, other, original, on the device that the inputs are on.

    Rounds go on until the noise is a quarter of TOLERANCE, or for `seconds` (SECONDS). A round's share is the other's
    time over the mean of the original's before and after it, so that a machine that slows down slows down both.
    """
    devices = {leaf.device for leaf in tree_leaves((list(args), dict(kwargs))) if isinstance(leaf, Tensor)}
    with evaluating(original, other), torch.no_grad():
        once = min(_seconds(original, args, kwargs, 1, devices) for _ in range(3))
        _seconds(other, args, kwargs, 1, devices)
        times = max(1, round(SHORTEST / max(once, 1e-9)))
        shares: list[float] = []
        selves: list[float] = []
        firsts: list[float] = []
        end = time.perf_counter() + (SECONDS if seconds is None else seconds)
        while len(shares) < ROUNDS or (time.perf_counter() < end and _error(selves) > TOLERANCE / 4):
            first, own, second = (_seconds(m, args, kwargs, times, devices) for m in (original, other, original))
            shares.append(2 * own / (first + second))
            selves.append(second / first)
            firsts.append(first / times)
    return Timing(median(shares), _error(selves), median(firsts))


def _seconds(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], times: int, devices: set[torch.device]
) -> float:
    given = [(fresh(list(args)), fresh(dict(kwargs))) for _ in range(times)]
    _wait(devices)
    start = time.perf_counter()
    for positional, named in given:
        module(*positional, **named)
    _wait(devices)
    return time.perf_counter() - start


def _wait(devices: set[torch.device]) -> None:
    """Devices other than the CPU work on while Python goes ahead."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def _error(values: Sequence[float]) -> float:
    """The standard error of the median: 1.25 deviations / sqrt(n), the deviation from the median absolute one."""
    middle = median(values)
    found: float = 1.2533 * 1.4826 * median(abs(v - middle) for v in values) / len(values) ** 0.5
    return found
