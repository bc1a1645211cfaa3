"""What a merge does without saying: nothing is merged, a ratio below one channel, random weights, training mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Grouping, Refusal
from fxmerge.plan import Plan

NAMED = 4  # groups that a notice names, at most


def notices(captured: Capture, grouping: Grouping, refusals: Sequence[Refusal], plan: Plan) -> tuple[str, ...]:
    """A sentence for each circumstance that the user may not have meant, most important first."""
    model = captured.model
    return (
        *_nothing(grouping, refusals, plan),
        *_too_small(grouping, refusals, plan),
        *(_untrained(model) if model is not None and not captured.blank else ()),
        *(_training(model) if model is not None else ()),
    )


def _nothing(grouping: Grouping, refusals: Sequence[Refusal], plan: Plan) -> Iterator[str]:
    if not plan.is_empty:
        return
    if not grouping.everything:
        yield "nothing was merged: no layer of this model has channels that can be dropped, for the reasons above"
    elif {g.name for g in grouping.everything} <= {r.name for r in refusals}:
        yield "nothing was merged: every group is left out, for the reasons above"
    else:
        yield "nothing was merged: every group keeps all of its channels"


def _too_small(grouping: Grouping, refusals: Sequence[Refusal], plan: Plan) -> Iterator[str]:
    """The groups of which the ratio asks for less than one channel."""
    options, gone = plan.options, {r.name for r in refusals} | {g.name for g in plan.groups}
    if options.budget or not options.ratio:
        return
    whole = [g for g in grouping.groups if g.name not in gone and not any(fnmatchcase(g.name, p) for p in options.keep)]
    if whole:
        some = ", ".join(g.name for g in whole[:NAMED]) + (f" and {len(whole) - NAMED} more" if whole[NAMED:] else "")
        step = f" a multiple of {options.round_to} channels (round_to)" if options.round_to > 1 else " one channel"
        yield f"ratio {options.ratio:g} is too small to drop{step} from {some}, with at most " + (
            f"{max(g.channels for g in whole):,} channels; they keep all"
        )


def _training(model: nn.Module) -> Iterator[str]:
    if model.training:
        yield (
            "the model is in training mode, and so is result.module; it was merged, and compared with the original, in "
            "evaluation mode: call .eval() before you measure either"
        )


def _untrained(model: nn.Module) -> Iterator[str]:
    """Norms start with the same value for each channel; in a trained model, not all of them still have it."""
    norms = [m for m in nn.Module.modules(model) if "norm" in type(m).__name__.lower()]
    held = [t for m in norms for t in _values(m)]
    if held and all(bool((t == t.flatten()[0]).all()) for t in held):
        yield (
            "the weights look random: every norm still has the values it starts with. What was measured here does not "
            "hold for a trained model; load its weights first"
        )


def _values(norm: nn.Module) -> Iterator[Tensor]:
    """The weight and bias of a norm, and its running statistics."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(norm, name, None)
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            yield value.detach()
