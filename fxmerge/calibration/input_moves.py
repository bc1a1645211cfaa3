"""What moving the inputs themselves by gradient steps needs: which may move, how many steps, and a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.batches import Batches
from fxmerge.graph.cost import cost
from fxmerge.ir.capture import Capture
from fxmerge.methods.probes import probed


def movable(captured: Capture) -> list[int]:
    """The numbers of the inputs that may move: those that are probed, in float32 or float64; less loses small steps."""
    return [at for at in probed(captured.inputs) if captured.inputs[at].dtype in (torch.float32, torch.float64)]


def affordable(captured: Capture, batches: Batches, place: int, *, steps: int, least: int, budget: float) -> int:
    """How many steps on these batches stay within a budget of FLOPs, `steps` at most; 0 if fewer than `least`.

    place: of an input that moves
    """
    samples = sum(len(batch[place]) for batch in batches) / len(captured.inputs[place])
    once = 3 * samples * cost(captured.module, captured.inputs).flops  # a backward pass costs two forward passes
    found = min(steps, int(budget / max(once, 1)))
    return found if found >= least else 0


def extent(batch: Sequence[Any], places: Sequence[int]) -> dict[int, tuple[float, float]]:
    """The range of each of these inputs: a model may be undefined outside of it, as a root is."""
    return {place: (float(batch[place].min()), float(batch[place].max())) for place in places}


def step(optimiser: torch.optim.Optimizer, loss: Tensor, moving: Sequence[Tensor]) -> None:
    """One step of the optimiser. Raises RuntimeError if an op has no gradient. Parameters get none."""
    slopes = torch.autograd.grad(loss, moving, allow_unused=True)
    for value, slope in zip(moving, slopes, strict=True):
        value.grad = slope
    optimiser.step()
