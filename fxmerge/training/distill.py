"""Training of a merged model towards its original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxmerge.calibration.user_data import placed
from fxmerge.errors import FxMergeError
from fxmerge.progress import progress
from fxmerge.result import Result
from fxmerge.training import checkpoint as files
from fxmerge.training.distillation import Distillation
from fxmerge.training.mixing import mixed

Loss = Callable[[Any, Any], Tensor]


def distill(
    result: Result,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    lr: float = 1e-4,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    loss: Loss | None = None,
    hidden: float = 1.0,
    temperature: float | None = None,
    batch_statistics: bool = False,
    mix: bool = False,
    held_out: Sequence[Any] | None = None,
    patience: int | None = None,
    ema: float | None = None,
    bf16: bool = False,
    compile: bool = False,
    checkpoint: str | Path | None = None,
    seed: int = 0,
) -> Result:
    """The merge with weights that are trained towards the original's outputs and activations. `result` is unchanged.

    It is a plain loop over `Distillation`, which other loops can use as well.

    batches: a DataLoader, or batches as `merge` takes for calibration; they are read once in each epoch. Labels are
        ignored, except by `loss`.
    epochs: passes over the batches.
    lr: learning rate, which falls to zero over the epochs by half a cosine.
    optimizer: from parameters, an optimizer in place of AdamW without weight decay, whose learning rates fall likewise.
    loss: of (the merged model's outputs, the batch), added to the distillation loss: cross entropy with labels.
    hidden, temperature, batch_statistics, compile: as in `Distillation`.
    mix: train on means of two samples, with weights drawn at random, in place of the samples themselves. The original
        knows its training data by heart, and its outputs between them say more. Not for integers, such as token ids,
        nor with `loss`, whose labels are those of samples.
    held_out: batches on which the loss is measured after each epoch, without `loss`; the best weights are returned, and
        those of the start are among them.
    patience: with `held_out`, the number of epochs without a better loss after which training ends.
    ema: decay of an exponential moving average of the weights, such as 0.999, which is returned in their place.
    bf16: compute in bfloat16 (torch.autocast); weights and their updates stay as they are.
    checkpoint: a file that is written after each epoch. If it exists, training goes on from there, to the same weights
        as without an interruption.
    seed: of the order of a DataLoader, and of dropout.
    Raises FxMergeError for batches that do not fit the model, for a checkpoint of another model, and where the loss
    becomes infinite or NaN.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise FxMergeError(f"epochs is {epochs!r}; give an integer of at least 1")
    if patience is not None and held_out is None:
        raise FxMergeError("patience needs held_out, batches on which the loss is measured after each epoch")
    if mix and loss is not None:
        raise FxMergeError("mix trains on means of two samples, whose labels loss does not know; leave one of them out")
    teaching = Distillation(result, hidden, temperature, batch_statistics, compile)
    captured = result.analysis.captured
    weights = [p for p in teaching.student.parameters() if p.requires_grad]
    steps = optimizer(weights) if optimizer else torch.optim.AdamW(weights, lr, weight_decay=0.0)
    rates = [group["lr"] for group in steps.param_groups]
    average = None
    if ema is not None:
        averaging = get_ema_multi_avg_fn(ema)  # type: ignore[no-untyped-call]
        average = AveragedModel(teaching.student, multi_avg_fn=averaging, use_buffers=True)
    kept = Distillation(result, hidden, temperature)  # the weights that are returned
    modules: dict[str, nn.Module] = {"student": teaching.student, "kept": kept.student}
    modules |= {"average": average} if average is not None else {}
    begun, best, losses = 0, None if held_out is None else _held_out(kept, captured, held_out, bf16), list[float]()
    first = best
    if checkpoint is not None and Path(checkpoint).exists():
        found = files.restore(Path(checkpoint), modules, steps)
        begun, best, losses, first = (found[name] for name in ("epochs", "best", "losses", "first"))
    with progress() as stage, torch.random.fork_rng(devices=[]):
        for epoch in range(begun, epochs):
            if patience is not None and first is not None and _stale([first, *losses], patience):
                break
            torch.manual_seed(seed + epoch)
            total, count = 0.0, 0
            teaching.train()
            for batch in batches:
                rate = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (epoch + _share(count, batches)) / epochs))).item()
                for group, own in zip(steps.param_groups, rates, strict=True):
                    group["lr"] = own * rate
                with _precision(teaching, bf16):
                    values = placed(captured, batch)
                    out = teaching(*(mixed(values) if mix else values))
                    whole = out["loss"] if loss is None else out["loss"] + loss(out["outputs"], batch)
                steps.zero_grad()
                whole.backward()
                steps.step()
                if average is not None:
                    average.update_parameters(teaching.student)
                total, count = total + float(whole.detach()), count + 1
                if not isfinite(total):
                    raise FxMergeError(
                        f"training diverged: the loss is {float(whole.detach())} in epoch {epoch + 1}, batch {count}; "
                        "give a smaller learning rate (lr, or that of your optimizer)"
                    )
                done = (epoch + _share(count, batches)) / epochs
                stage(f"distill epoch {epoch + 1} of {epochs}, batch {count}, loss {total / count:.4f}", done)
            if not count:
                raise FxMergeError("there are no batches to train on; a generator can be read in one epoch only")
            latest = teaching.student if average is None else average.module
            if held_out is None:
                kept.student.load_state_dict(latest.state_dict())
                losses.append(total / count)
            else:
                candidate = Distillation(result, hidden, temperature)
                candidate.student.load_state_dict(latest.state_dict())
                losses.append(_held_out(candidate, captured, held_out, bf16))
                if best is None or losses[-1] < best:
                    best = losses[-1]
                    kept.student.load_state_dict(latest.state_dict())
            if checkpoint is not None:
                saved = {"epochs": epoch + 1, "best": best, "losses": losses, "first": first}
                files.save(Path(checkpoint), modules, steps, saved)
    return _reported(kept.result(), losses, first, best)


def _share(count: int, batches: Iterable[Any]) -> float:
    """How much of an epoch is over, where its length is known."""
    try:
        return count / max(1, len(batches))  # type: ignore[arg-type]
    except TypeError:
        return 0.0


def _precision(module: nn.Module, bf16: bool) -> Any:
    device = next((p.device.type for p in module.parameters()), "cpu")
    return torch.autocast(device, torch.bfloat16) if bf16 else nullcontext()


def _held_out(teaching: Distillation, captured: Any, batches: Sequence[Any], bf16: bool) -> float:
    """The mean loss of the outputs on batches, in evaluation mode."""
    teaching.eval()
    with torch.no_grad(), _precision(teaching, bf16):
        found = [float(teaching(*placed(captured, batch))["output_loss"]) for batch in batches]
    if not found:
        raise FxMergeError("held_out holds no batches")
    return sum(found) / len(found)


def _stale(losses: Sequence[float], patience: int) -> bool:
    """Whether the best loss, that of the start included, is `patience` epochs old."""
    return len(losses) - 1 - losses.index(min(losses)) >= patience


def _reported(result: Result, losses: Sequence[float], first: float | None, best: float | None) -> Result:
    """The result with a note on its training."""
    note = f"trained towards the original for {len(losses)} epoch{'s' if len(losses) != 1 else ''}"
    if first is not None and best is not None:
        note += f": loss of the outputs on held-out batches {first:.3g} -> {best:.3g}"
    return replace(result, report=replace(result.report, notes=(*result.report.notes, note)))
