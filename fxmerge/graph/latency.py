"""Times one model against another, with an estimate of the noise."""

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

ROUNDS = 9  # the smallest number of rounds
SECONDS = 6.0  # no round starts after this time, once there are ROUNDS of them
SHORTEST = 5e-3  # seconds; shorter calls are repeated until one measurement takes this long
TOLERANCE = 0.03  # relative error of a latency


@dataclass(frozen=True)
class Timing:
    """The time of one call of a model, relative to the original's."""

    share: float  # the median over rounds of the model's time / the original's
    noise: float  # the standard error of such a median when the original is compared with itself
    seconds: float  # one call of the original


def compared(
    original: nn.Module, other: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], seconds: float | None = None
) -> Timing:
    """Times two modules in turn (original, other, original) on the device of the inputs.

    Rounds are repeated until the noise is below a quarter of TOLERANCE, or for `seconds` (SECONDS by default). In each
    round, the other's time is divided by the mean of the original's times before and after it, so that a change in
    the machine's speed affects both.
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
    """The seconds that `times` calls take together; each call has fresh copies of the inputs."""
    given = [(fresh(list(args)), fresh(dict(kwargs))) for _ in range(times)]
    wait(devices)
    start = time.perf_counter()
    for positional, named in given:
        module(*positional, **named)
    wait(devices)
    return time.perf_counter() - start


def wait(devices: set[torch.device]) -> None:
    """Waits for devices that run asynchronously."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def _error(values: Sequence[float]) -> float:
    """The standard error of the median: 1.2533 s / sqrt(n), with s = 1.4826 times the median absolute deviation."""
    middle = median(values)
    found: float = 1.2533 * 1.4826 * median(abs(v - middle) for v in values) / len(values) ** 0.5
    return found
