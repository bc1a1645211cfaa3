"""How much faster fxmerge merges VGG-16 than the published algorithm does: `python -m benchmarks.speed`.

Both do the same mathematics on the same random weights, in turns, and must come to the same network. Times are CPU
seconds on one thread, which a busy machine disturbs less than the clock.
The baseline computes as the published code does: a Python loop over pairs of a dropped and a kept channel, then one
over the filters of the next layer (Kim et al., NeurIPS 2020, Algorithms 1 to 3). fxmerge's time is that of the whole
of `fxmerge.merge`: tracing, analysis, merging, rewriting and checking.
"""

import argparse
import gc
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

import fxmerge
from benchmarks.models import VGG, example_input, vgg16
from benchmarks.paper import VGG_CIFAR10, by_convolution

Array = NDArray[np.float32]

LAM = 0.85
THRESHOLD = 0.0  # none: random weights are so dissimilar that 0.1 would leave nothing to merge


@dataclass(frozen=True)
class Layer:
    """A convolution that the baseline has merged: its kept channels, the scale matrix (n, k), its new weight."""

    kept: NDArray[np.int64]
    scale: NDArray[np.float64]
    weight: Tensor


def random_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode, each BatchNorm with random statistics and parameters, gamma > 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
            nn.init.normal_(module.running_mean, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
    return model.eval()


@torch.no_grad()
def baseline(model: VGG, widths: Sequence[int]) -> tuple[dict[str, Layer], Tensor]:
    """The merged convolutions by name, and the classifier's new weight; the largest l1 norms stay."""
    convs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    layers: dict[str, Layer] = {}
    up: Tensor | None = None
    for (name, conv), norm, width in zip(convs, norms, widths, strict=True):
        rows = conv.weight.flatten(1)
        kept = np.sort(np.argsort(torch.norm(rows, 1, 1).numpy())[::-1][:width])
        scale = scale_matrix(rows.numpy(), kept, norm)
        weight = conv.weight if up is None else absorb(conv.weight, up)
        layers[name] = Layer(kept, scale, weight[torch.from_numpy(kept)])
        up = torch.from_numpy(scale).float()
    assert up is not None
    return layers, absorb(model.classifier.weight, up)


def absorb(weight: Tensor, up: Tensor) -> Tensor:
    """One filter after the other, (n, ...) -> (k, ...): its slices for the dropped channels go to the kept ones."""
    out = torch.empty(len(weight), up.size(1), *weight.shape[2:])
    for i, one in enumerate(weight):
        out[i] = torch.mm(up.T, one.reshape(len(up), -1)).view(out.shape[1:])
    return out


def scale_matrix(
    rows: Array, kept: NDArray[np.int64], norm: nn.BatchNorm2d, threshold: float = THRESHOLD
) -> NDArray[np.float64]:
    """(n, k): where each of n channels goes and how much of it, with the published code's S and B."""
    buffers = norm.weight, norm.bias, norm.running_mean, norm.running_var
    gamma, beta, mean, var = (t.detach().numpy() for t in buffers if t is not None)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    apart = 1 - unit @ unit.T
    scale = np.zeros((len(rows), len(kept)))
    for i, row in enumerate(rows):
        if i in kept:  # both looks through the array are the published code's
            scale[i, np.where(kept == i)[0]] = 1
            continue
        length, gamma_i, beta_i, mean_i, var_i = np.linalg.norm(row), gamma[i], beta[i], mean[i], var[i]
        cosines, scales, offsets = [], [], []
        for j in kept:
            gamma_j, var_j = gamma[j], var[j]
            s = length / np.linalg.norm(rows[j])
            scale_ij = s * (gamma_j / gamma_i) * (var_i / var_j)
            constant = s * (mean_i - var_i * beta_i / gamma_i) - mean[j]
            cosines.append(apart[i, j])
            scales.append(scale_ij)
            offsets.append(abs(gamma_j / var_j * constant + beta[j]) / scale_ij)
        relative = (np.array(offsets) - np.min(offsets)) / (np.max(offsets) - np.min(offsets))
        best = np.argmin(LAM * np.array(cosines) + (1 - LAM) * relative)
        if not threshold or 1 - cosines[best] >= threshold:
            scale[i, best] = scales[best]
    return scale


def merge(model: VGG, example: Tensor, widths: Sequence[int]) -> fxmerge.Result:
    """The same by fxmerge."""
    return fxmerge.merge(
        model,
        example,
        **by_convolution(widths)(model, None),
        selection="l1",
        mostsim_scale="reference",
        lam=LAM,
        threshold=THRESHOLD,
        refit="none",
    )


def check_same(layers: dict[str, Layer], classifier: Tensor, result: fxmerge.Result) -> None:
    """AssertionError unless kept channels, partners, scales and weights are the same, but for rounding."""
    weights = result.module.state_dict()
    plans = {group.name: group for group in result.plan.groups}
    for name, layer in layers.items():
        channels = len(layer.scale)
        scale = np.zeros_like(layer.scale)
        scale[layer.kept, range(len(layer.kept))] = 1
        if len(layer.kept) < channels:
            assert plans[name].kept == tuple(layer.kept), f"{name}: other channels are kept"
            for partner in plans[name].partners:
                if partner.into >= 0:
                    scale[partner.channel, plans[name].kept.index(partner.into)] = partner.scale
        np.testing.assert_allclose(layer.scale, scale, rtol=1e-4, err_msg=f"{name}: other partners or scales")
        torch.testing.assert_close(layer.weight, weights[f"{name}.weight"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(classifier, weights["classifier.weight"], rtol=1e-3, atol=1e-4)


@contextmanager
def stage_seconds() -> Iterator[dict[str, float]]:
    """Seconds by stage of the merges done inside; the stages are what fxmerge's progress bar shows."""
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watch() -> Iterator[Callable[[str], None]]:
        marks: list[tuple[str, float]] = []
        yield lambda stage: marks.append((stage.split()[0], time.process_time()))
        marks.append(("", time.process_time()))
        for (stage, start), (_, end) in pairwise(marks):
            seconds[stage] += end - start

    with patch.object(importlib.import_module("fxmerge.api"), "progress", watch):
        yield seconds


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """(CPU seconds, result). What earlier runs left is collected first: users merge once, not beside their last ten."""
    gc.collect()
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def measure(runs: int, baseline_runs: int, console: Console) -> tuple[float, float, dict[str, float]]:
    """Median seconds of the baseline and of fxmerge on VGG-16 in turns, and fxmerge's share of each stage.

    With more than one of torch's threads these are not comparable.
    """
    torch.manual_seed(0)
    model, example = vgg16(), example_input("vgg16")[:1]
    random_batch_norm(model)
    fxmerge.merge(nn.Linear(4, 4), torch.zeros(1, 4))  # what is imported late is imported now
    ours, theirs = [], []
    with stage_seconds() as stages:
        for run in range(max(runs, baseline_runs)):
            if run < runs:
                seconds, result = timed(merge, model, example, VGG_CIFAR10)
                ours.append(seconds)
                console.print(f"fxmerge.merge: {seconds:.2f} s")
            if run < baseline_runs:
                seconds, (layers, classifier) = timed(baseline, model, VGG_CIFAR10)
                theirs.append(seconds)
                console.print(f"published algorithm: {seconds:.2f} s")
                check_same(layers, classifier, result)
    whole = sum(stages.values())
    return median(theirs), median(ours), {stage: seconds / whole for stage, seconds in stages.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Time fxmerge on VGG-16.")
    parser.add_argument("--runs", type=int, default=3, help="of fxmerge")
    parser.add_argument("--baseline-runs", type=int, default=2, help="of the published algorithm; at most --runs")
    args = parser.parse_args(argv)
    if not 1 <= args.baseline_runs <= args.runs:
        parser.error("give 1 <= --baseline-runs <= --runs")
    torch.set_num_threads(1)
    theirs, ours, shares = measure(args.runs, args.baseline_runs, Console(stderr=True, highlight=False))
    out = Console(width=120, highlight=False)
    out.print("stages: " + ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items()))
    times = f"published algorithm {theirs:.2f} s, fxmerge {ours:.2f} s, ratio {theirs / ours:.1f}"
    out.print(f"VGG-16, CPU time on one thread: {times}")


if __name__ == "__main__":
    main()
