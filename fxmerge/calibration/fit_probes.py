"""Fitting: probes are moved until the original's BatchNorms see what they saw in training.

The running mean M and variance V of its BatchNorms are all that a trained network tells of its data. With m and v those
of a batch of probes, and both taken as Gaussian, the divergence

    mean over BatchNorms of mean over channels of (v / V - 1 - log(v / V) + (m - M)^2 / V) / 2

chooses the family of probes, and is then lowered by a few steps of Adam on the probes themselves (Cai et al., "ZeroQ",
CVPR 2020, section 3.1, where it is a squared distance). No weight is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.batches import Batches, UnprobedError, fed
from fxmerge.calibration.epilogue import pair
from fxmerge.calibration.paired_run import Lockstep, Settings, moments
from fxmerge.graph.cost import cost
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.methods.least_squares import Reduce
from fxmerge.methods.probes import probed
from fxmerge.options import Options
from fxmerge.weights.by_path import at

STEPS = 20  # of Adam, with a short memory and a rate (in deviations of the probes) that falls to FALL of the first:
RATE, BETAS, FALL = 0.15, (0.7, 0.9), 0.3  # in a dozen steps twice as near as the usual 0.1, (0.9, 0.999), 1
BUDGET = 2.4e12  # FLOPs of all steps together, at most; no probe is moved where fewer than LEAST steps are within it
LEAST = 5
STRAY = 0.5  # divergence of a layer's outputs from the statistics behind it, where its inputs have theirs


def normed(facts: Provenance) -> dict[str, Layer]:
    """The BatchNorms with running statistics, by node."""
    return {n.node: n for n in facts.layers if n.op == "batch_norm" and {"running_mean", "running_var"} <= {*n.params}}


def mismatch(captured: Capture, facts: Provenance, batches: Sequence[Sequence[Any]], settings: Settings) -> float:
    """The divergence of the batches' statistics at the BatchNorms from the running ones; 0 without a BatchNorm."""
    with evaluating(captured.module), torch.no_grad():
        return float(_divergence(captured, facts, batches, settings))


STRAYS = "probes run as they are, since the BatchNorms' running statistics are far from what the layers give"


def batches_of(
    captured: Capture, facts: Provenance, options: Options, given: Any, settings: Settings,
    stage: Callable[[str], None],
) -> tuple[Batches, tuple[str, ...]]:  # fmt: skip
    """What refit runs on, the user's batches or fitted probes, or none and the reason; (STRAYS,): not to be held."""
    if options.refit == "none":
        return [], ()
    if captured.recorded is not None:  # its code between the parts cannot run in lockstep: the widths are its own
        return [], ("refit is left out, as only parts of the model could be traced",)
    stage("probes" if given is None else "calibration")
    try:
        batches = fed(captured, facts, options, given, lambda b: mismatch(captured, facts, b, settings))
    except UnprobedError as why:
        return [], (str(why),)
    if given is not None:
        return batches, ()
    if not holds(captured, facts, batches, settings):
        return batches, (STRAYS,)
    return fitted(captured, facts, batches, settings, stage), ()


def holds(captured: Capture, facts: Provenance, batches: Batches, settings: Settings) -> bool:
    """Do the running statistics tell what the layers give, so that streams can be held where they say?

    They are compared where every earlier BatchNorm is held: a trained network is within STRAY whatever the probes, one
    that was never trained is not, and no stream of it ever comes where they say.
    """
    return mismatch(captured, facts, batches[:1], replace(settings, held=True)) < STRAY


def fitted(
    captured: Capture, facts: Provenance, batches: Batches, settings: Settings,
    stage: Callable[[str], None] = lambda name: None,
) -> Batches:  # fmt: skip
    """The probes, fitted; as they are without a BatchNorm, and where it takes more than BUDGET or a gradient that an
    op does not have.
    """
    places = [at for at in probed(captured.inputs) if captured.inputs[at].dtype in (torch.float32, torch.float64)]
    if not places or not normed(facts):
        return batches
    samples = sum(len(batch[places[0]]) for batch in batches) / len(captured.inputs[places[0]])
    once = 3 * samples * cost(captured.module, captured.inputs).flops  # a backward pass takes two forward ones
    steps = min(STEPS, int(BUDGET / max(once, 1)))
    if steps < LEAST:
        return batches
    try:
        return _moved(captured, facts, batches, settings, places, steps, stage)
    except RuntimeError:  # an op without a gradient
        return batches


def _moved(
    captured: Capture, facts: Provenance, batches: Batches, settings: Settings, places: Sequence[int], steps: int,
    stage: Callable[[str], None],
) -> Batches:  # fmt: skip
    alone, found = replace(settings, held=False), []
    with evaluating(captured.module), torch.enable_grad():
        for number, batch in enumerate(batches):
            stage(f"probes {number + 1} of {len(batches)}")
            moving = {place: batch[place].clone().requires_grad_() for place in places}
            values = [moving.get(place, value) for place, value in enumerate(batch)]
            adam = torch.optim.Adam(list(moving.values()), lr=RATE, betas=BETAS)
            falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, FALL, total_iters=steps)
            for _ in range(steps):
                loss = _divergence(captured, facts, [values], alone, _own_moments)
                slopes = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
                for value, slope in zip(moving.values(), slopes, strict=True):
                    value.grad = slope
                adam.step()
                falling.step()
            found.append([moving[place].detach() if place in moving else value for place, value in enumerate(batch)])
    return found


def _own_moments(values: Sequence[Tensor], axis: int, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """`moments` of the one batch that is being moved, in its own precision: a backward pass in float64 takes long."""
    mean, variance = _Moments.apply(values[0], axis)
    return mean.double(), variance.double()


class _Moments(torch.autograd.Function):
    """Mean and variance along all axes but one, with the few passes over x that it takes and no more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        axes, ctx.view = [a for a in range(x.dim()) if a != axis], [-1 if a == axis else 1 for a in range(x.dim())]
        mean = x.mean(axes)
        apart = x - mean.view(ctx.view)
        ctx.save_for_backward(apart)
        return mean, apart.square().mean(axes)

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> tuple[Tensor, None]:
        (apart,) = ctx.saved_tensors
        each = of_mean.numel() / apart.numel()  # d mean / dx = each, d variance / dx = 2 each (x - mean)
        slope, level = (of_variance * (2 * each)).view(ctx.view), (of_mean * each).view(ctx.view)
        return torch.addcmul(level, apart, slope), None


def _divergence(
    captured: Capture, facts: Provenance, batches: Sequence[Sequence[Any]], settings: Settings,
    moments: Callable[[Sequence[Tensor], int, Reduce], tuple[Tensor, Tensor]] = moments,
) -> Tensor:  # fmt: skip
    norms, module, found = normed(facts), captured.module, []
    run = Lockstep(pair(module, facts), batches, settings)
    for step in run:
        layer = norms.get(step.node.name)
        if layer is None:
            continue
        mean, variance = moments(run.original.values[step.node.all_input_nodes[0].name], 1, settings.reduce)
        expected = at(module, layer.params["running_mean"]).double()
        spread = at(module, layer.params["running_var"]).double() + layer.eps
        ratio = (variance + layer.eps) / spread
        found.append((ratio - 1 - ratio.log() + (mean - expected).square() / spread).mean() / 2)
    return torch.stack(found).mean() if found else torch.zeros(())
