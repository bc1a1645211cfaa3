"""The data that refit runs on: the user's batches, or probes that are fitted to the BatchNorms' running statistics.

The running mean M and variance V of its BatchNorms are all that a trained network knows of its training data. With m
and v the mean and variance of a batch of probes, and with both distributions taken as Gaussian, the divergence

    mean over BatchNorms of mean over channels of (v / V - 1 - log(v / V) + (m - M)^2 / V) / 2

is used to choose the family of probes. It is then lowered by a few steps of Adam on the probes themselves (Cai et al.,
"ZeroQ", CVPR 2020, section 3.1, which uses a squared distance). No weight is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.batches import Batches, UnprobedError, fed
from fxmerge.calibration.diverse_outputs import diversified
from fxmerge.calibration.epilogue import pair, rectified_layers
from fxmerge.calibration.input_moves import affordable, extent, movable, step
from fxmerge.calibration.padding import Padding, padding_of
from fxmerge.calibration.paired_run import PairedRun, Settings, channel_shape, moments
from fxmerge.calibration.part_batches import fed_in_parts
from fxmerge.calibration.trial_runs import channels_last
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Layer, Provenance, batch_norms
from fxmerge.methods.least_squares import Reduce
from fxmerge.options import Options
from fxmerge.progress import Stage, silent
from fxmerge.weights.by_path import at

STEPS = 20  # of Adam, with a short memory and a rate (in standard deviations of the probes) that falls to FALL times
RATE, BETAS, FALL = 0.15, (0.7, 0.9), 0.3  # RATE: a dozen steps get twice as close as with 0.1, (0.9, 0.999) and 1
BUDGET = 2.4e12  # FLOPs of all steps together, at most; probes are not fitted if this allows fewer than LEAST steps
LEAST = 5
STRAY = 0.5  # the largest divergence of a trained network's layers from the running statistics of their BatchNorms
_STRAYED = "probes run as they are, since the BatchNorms' running statistics are far from those of the layers' outputs"


@dataclass(frozen=True, kw_only=True)
class RefitData:
    """What refit runs on.

    batches:  by batch, the values of the graph's placeholders; empty where refit is left out
    held:     whether both streams are held where training left them (see `paired_run`)
    made:     the number of leading batches that hold the user's own samples; 0 for probes
    source:   what the batches hold, for the report; "" where refit is left out
    notes:    what else the report says about the data
    padding:  which positions of the batches are no rows
    """

    batches: Batches
    held: bool
    made: int = 0
    source: str = ""
    notes: tuple[str, ...] = ()
    padding: Padding | None = None


def refit_data(
    captured: Capture, facts: Provenance, options: Options, *, given: Any, settings: Settings,
    stage: Stage,
) -> RefitData:  # fmt: skip
    """The user's batches `given`, or fitted probes where it is None.

    Raises FxMergeError where the batches do not fit the model.
    """
    held = settings.held and bool(batch_norms(facts) or rectified_layers(captured.module, facts))
    settings = replace(settings, held=held)
    if options.refit == "none":
        return RefitData(batches=[], held=held)
    stage("probes" if given is None else "calibration")
    if captured.recorded is not None:
        return _in_parts(captured, facts, options, given=given, settings=settings, stage=stage)
    try:
        found = fed(captured, facts, options, given, lambda b: mismatch(captured, facts, b, settings))
    except UnprobedError as error:
        return RefitData(batches=[], held=held, notes=(str(error),))
    batches, source = channels_last(captured, found.batches), found.source
    if given is not None:
        padding = padding_of(captured, batches)
        source += ", without padding" if padding else ""
        return RefitData(batches=batches, held=held, made=found.made, source=source, padding=padding)
    if found.real:  # real data leave the streams where training did
        held = False
        if found.alike:
            return RefitData(batches=batches, held=held, source=source)
        if not normed(facts):
            some = batches[1::2]
            moved = diversified(captured, facts, some, settings)
            if moved is not some:
                batches[1::2], source = moved, f"{source}; every second batch moved, for diverse outputs"
    elif not holds(captured, facts, batches, settings):
        return RefitData(batches=batches, held=False, source=source, notes=(_STRAYED,))
    batches = fitted(captured, facts, batches, settings, stage)
    return RefitData(batches=batches, held=held, source=source)


def _in_parts(
    captured: Capture, facts: Provenance, options: Options, *, given: Any, settings: Settings,
    stage: Stage,
) -> RefitData:  # fmt: skip
    """The data for a model whose parts alone were traced: what reaches these when its own code runs. Never moved."""
    try:
        found, notes = fed_in_parts(captured, facts, options, given, stage)
    except UnprobedError as error:
        return RefitData(batches=[], held=settings.held, notes=(str(error),))
    held = not found.real and settings.held and holds(captured, facts, found.batches, settings)
    if not found.real and settings.held and not held:
        notes = (*notes, _STRAYED)
    return RefitData(batches=found.batches, held=held, made=found.made, source=found.source, notes=notes)


def normed(facts: Provenance) -> dict[str, Layer]:
    """The BatchNorms that have running statistics, by node."""
    return {n: norm for n, norm in batch_norms(facts).items() if norm.has_running_statistics}


def mismatch(captured: Capture, facts: Provenance, batches: Sequence[Sequence[Any]], settings: Settings) -> float:
    """The divergence of the batches' statistics at the BatchNorms from the running ones; 0 without a BatchNorm."""
    with evaluating(captured.module), torch.no_grad():
        return float(_divergence(captured, facts, batches, settings))


def holds(captured: Capture, facts: Provenance, batches: Batches, settings: Settings) -> bool:
    """Whether the running statistics are those of the layers' outputs, so that streams can be held there.

    They are compared with every earlier BatchNorm held. A trained network is within STRAY for any probes. A network
    that was never trained is not, and none of its streams ever has these statistics.
    """
    return mismatch(captured, facts, batches[:1], replace(settings, held=True)) < STRAY


def fitted(
    captured: Capture, facts: Provenance, batches: Batches, settings: Settings,
    stage: Stage = silent,
) -> Batches:  # fmt: skip
    """The probes, fitted.

    They are returned unchanged if there is no BatchNorm, if LEAST steps exceed BUDGET, or if an op has no gradient.
    """
    places = movable(captured)
    if not places or not normed(facts):
        return batches
    steps = affordable(captured, batches, places[0], steps=STEPS, least=LEAST, budget=BUDGET)
    if not steps:
        return batches
    try:
        return _moved(captured, facts, batches, settings, places=places, steps=steps, stage=stage)
    except RuntimeError:  # an op without a gradient
        return batches


def _moved(
    captured: Capture, facts: Provenance, batches: Batches, settings: Settings, *, places: Sequence[int], steps: int,
    stage: Stage,
) -> Batches:  # fmt: skip
    """The batches after `steps` of Adam on the inputs at these places, one batch after another."""
    alone = replace(settings, held=False)
    found: Batches = []
    with evaluating(captured.module), torch.enable_grad():
        for number, batch in enumerate(batches):
            stage(f"probes {number + 1} of {len(batches)}", number / len(batches))
            moving = {place: batch[place].clone().requires_grad_() for place in places}
            ranges = extent(batch, places)
            values = [moving.get(place, value) for place, value in enumerate(batch)]
            rates = [{"params": [x], "lr": RATE * float(x.detach().std())} for x in moving.values()]
            adam = torch.optim.Adam(rates, betas=BETAS)
            falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, FALL, total_iters=steps)
            for _ in range(steps):
                step(adam, _divergence(captured, facts, [values], alone, _own_moments), list(moving.values()))
                falling.step()
                with torch.no_grad():
                    for place, value in moving.items():
                        value.clamp_(*ranges[place])
            found.append([moving[place].detach() if place in moving else value for place, value in enumerate(batch)])
    return found


def _own_moments(values: Sequence[Tensor], axis: int, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """`moments` of the one batch that is being fitted, in its own precision: a backward pass in float64 is slow."""
    mean, variance = _Moments.apply(values[0], axis)
    return mean.double(), variance.double()


class _Moments(torch.autograd.Function):
    """Mean and variance along all axes except one, in as few passes over x as possible."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        axes, ctx.view = [a for a in range(x.dim()) if a != axis], channel_shape(axis, x.dim())
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
    """The divergence that the module's docstring defines, as a tensor of one number; 0 without a BatchNorm."""
    norms, module, found = normed(facts), captured.module, []
    run = PairedRun(pair(module, facts), batches, settings)
    for visit in run:
        layer = norms.get(visit.node.name)
        if layer is None:
            continue
        mean, variance = moments(run.original.values[visit.node.all_input_nodes[0].name], 1, settings.reduce)
        expected = at(module, layer.params["running_mean"]).double()
        spread = at(module, layer.params["running_var"]).double() + layer.eps
        ratio = (variance + layer.eps) / spread
        found.append((ratio - 1 - ratio.log() + (mean - expected).square() / spread).mean() / 2)
    return torch.stack(found).mean() if found else torch.zeros(())
