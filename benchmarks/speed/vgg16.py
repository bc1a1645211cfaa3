"""How much faster fxmerge merges VGG-16 than the published algorithm: `python -m benchmarks.speed`.

Both do the same mathematics on the same random weights, alternately, and must give the same network. Times are CPU
seconds on one thread, which depend less on the load of the machine than wall-clock time.

The baseline computes like the published code: a Python loop over pairs of a dropped and a kept channel, then a loop
over the filters of the next layer (Kim et al., NeurIPS 2020, Algorithms 1 to 3). The time of fxmerge is that of the
whole call of `fxmerge.merge`: capture, analysis, merging, rewriting and verification.
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
from benchmarks.networks.models import VGG, example_input, vgg16
from benchmarks.networks.published import VGG_CIFAR10, by_convolution
from benchmarks.paper.neuron_merging import LAM, absorb, scale_matrix

THRESHOLD = 0.0  # no threshold: random weights are so dissimilar that with 0.1 no channel would be merged


@dataclass(frozen=True)
class Layer:
    """A convolution merged by the baseline: its kept channels (k,), scale matrix (n, k) and new weight."""

    kept: NDArray[np.int64]
    scale: NDArray[np.float64]
    weight: Tensor


def random_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give each BatchNorm random statistics and parameters, with gamma > 0; returns `model` in eval mode."""
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
    """The merged convolutions by name and the new weight of the classifier; the largest l1 norms are kept."""
    convs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    layers: dict[str, Layer] = {}
    up: Tensor | None = None
    for (name, conv), norm, width in zip(convs, norms, widths, strict=True):
        rows = conv.weight.flatten(1)
        kept = np.sort(np.argsort(torch.norm(rows, 1, 1).numpy())[::-1][:width])
        scale = scale_matrix(rows.numpy(), kept, norm, THRESHOLD)
        weight = conv.weight if up is None else absorb(conv.weight, up)
        layers[name] = Layer(kept, scale, weight[torch.from_numpy(kept)])
        up = torch.from_numpy(scale).float()
    assert up is not None
    return layers, absorb(model.classifier.weight, up)


def merge(model: VGG, example: Tensor, widths: Sequence[int]) -> fxmerge.Result:
    """Merge with fxmerge, with the settings of the baseline."""
    return fxmerge.merge(
        model,
        example,
        **by_convolution(widths)(model, None),
        selection="l1",
        decomposition="mostsim",
        mostsim_scale="reference",
        lam=LAM,
        threshold=THRESHOLD,
        refit="none",
    )


def check_same(layers: dict[str, Layer], classifier: Tensor, result: fxmerge.Result) -> None:
    """Raise AssertionError unless kept channels, partners, scales and weights are equal up to rounding."""
    weights = result.module.state_dict()
    plans = {group.name: group for group in result.plan.groups}
    for name, layer in layers.items():
        channels = len(layer.scale)
        scale = np.zeros_like(layer.scale)
        scale[layer.kept, range(len(layer.kept))] = 1
        if len(layer.kept) < channels:
            assert plans[name].kept == tuple(layer.kept), f"{name}: different channels are kept"
            for partner in plans[name].partners:
                if partner.into >= 0:
                    scale[partner.channel, plans[name].kept.index(partner.into)] = partner.scale
        np.testing.assert_allclose(layer.scale, scale, rtol=1e-4, err_msg=f"{name}: different partners or scales")
        torch.testing.assert_close(layer.weight, weights[f"{name}.weight"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(classifier, weights["classifier.weight"], rtol=1e-3, atol=1e-4)


def by_stage(marks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each stage, from when stages began; the last mark is the end."""
    found: dict[str, float] = defaultdict(float)
    for (stage, start), (_, end) in pairwise(marks):
        found[stage] += end - start
    return dict(found)


@contextmanager
def stage_seconds() -> Iterator[dict[str, float]]:
    """CPU seconds of each stage, summed over the merges inside the context; stages are those of the progress bar."""
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watch() -> Iterator[Callable[[str], None]]:
        marks: list[tuple[str, float]] = []
        yield lambda stage, done=0.0: marks.append((stage.split()[0], time.process_time()))
        marks.append(("", time.process_time()))
        for stage, own in by_stage(marks).items():
            seconds[stage] += own

    with patch.object(importlib.import_module("fxmerge.api"), "progress", watch):
        yield seconds


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """CPU seconds and result of a call. Garbage of earlier runs is collected first, so that it is not counted."""
    gc.collect()
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def measure(runs: int, baseline_runs: int, console: Console) -> tuple[float, float, dict[str, float]]:
    """Median CPU seconds of the baseline and of fxmerge on VGG-16, and the share of each stage of fxmerge.

    Call it with one torch thread: with more, the two times cannot be compared.
    """
    torch.manual_seed(0)
    model, example = vgg16(), example_input("vgg16")[:1]
    random_batch_norm(model)
    fxmerge.merge(nn.Linear(4, 4), torch.zeros(1, 4))  # imports what fxmerge imports on first use
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Time merging VGG-16.")
    parser.add_argument("--runs", type=int, default=3, help="runs of fxmerge")
    parser.add_argument("--baseline-runs", type=int, default=2, help="runs of the baseline, at most --runs")
    args = parser.parse_args(argv)
    if not 1 <= args.baseline_runs <= args.runs:
        parser.error("give 1 <= --baseline-runs <= --runs")
    torch.set_num_threads(1)
    theirs, ours, shares = measure(args.runs, args.baseline_runs, Console(stderr=True, highlight=False))
    out = Console(width=120, highlight=False)
    out.print("stages: " + ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items()))
    times = f"published algorithm {theirs:.2f} s, fxmerge {ours:.2f} s, ratio {theirs / ours:.1f}"
    out.print(f"VGG-16, CPU time on one thread: {times}")
