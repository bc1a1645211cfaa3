"""Trial runs: whether a captured model runs on values, batch sizes and memory formats other than the example's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.held_out import of_samples, samples
from fxmerge.calibration.sample_run import SampleRun
from fxmerge.errors import first_line
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.nested import fresh
from fxmerge.graph.outputs import returned
from fxmerge.ir.capture import Capture
from fxmerge.methods.probes import sample_axis


def refused(captured: Capture, values: Sequence[Any]) -> str:
    """How the model fails on these values of its placeholders; "" where its outputs are finite.

    "" for a run of the user's own code, which has succeeded.
    """
    if isinstance(values, SampleRun):
        return ""
    interpreter = fx.Interpreter(captured.module)
    interpreter.extra_traceback = False
    try:
        with evaluating(captured.module), torch.no_grad():
            outputs = interpreter.run(*fresh(list(values)), enable_io_processing=False)
    except Exception as error:
        return f"fails ({type(error).__name__}: {first_line(error)})"
    finite = all(bool(torch.isfinite(y).all()) for y in returned(outputs))
    return "" if finite else "gives NaN or infinity"


def takes_any_batch(captured: Capture) -> bool:
    """Whether batches may be cut and joined: the model is tried on one and on two samples.

    Runs of the user's own code are not.
    """
    if captured.recorded is not None:
        return False
    own = samples(captured.inputs)
    return not any(refused(captured, [_first(value, own, count) for value in captured.inputs]) for count in (1, 2))


def first_samples(captured: Capture, batches: Sequence[Sequence[Any]], wanted: int) -> list[Sequence[Any]]:
    """The first `wanted` samples; whole batches where the model does not take parts of them."""
    divisible, taken = takes_any_batch(captured), 0
    found: list[Sequence[Any]] = []
    for batch in batches:
        part = min(samples(batch), wanted - taken) if divisible else samples(batch)
        found.append(of_samples(batch, slice(part)))
        taken += part
        if taken >= wanted:
            break
    return found


def _first(value: Any, own: int, count: int) -> Any:
    """The first `count` samples of an input, which is repeated if it has fewer. own: the samples in the example"""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    axis = sample_axis(value, own) or 0
    return torch.cat([value] * -(-count // max(value.size(axis), 1)), axis).narrow(axis, 0, count)


def channels_last(captured: Capture, batches: list[Sequence[Any]]) -> list[Sequence[Any]]:
    """The batches with images in channels_last, in which processors convolve faster, if the model runs on them."""
    found: list[Sequence[Any]] = [[_channels_last(value) for value in batch] for batch in batches]
    return batches if not found or refused(captured, found[0]) else found


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point() and value.device.type == "cpu":
        return value.contiguous(memory_format=torch.channels_last)
    return value
