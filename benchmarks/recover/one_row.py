"""Measure one row of benchmarks.recover. This runs in its own process.

The test images are used once, after the last epoch. After each epoch, what is needed to go on is written to a file, so
that a row which was stopped continues, to the same weights.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fxmerge
from benchmarks.coverage.zoo import Specimen
from benchmarks.harness.process import Finding, caught
from benchmarks.networks import data, published
from benchmarks.networks.models import load_checkpoint
from benchmarks.real.one_row import machine, size
from benchmarks.recover import training
from benchmarks.recover.methods import METHODS, NETWORKS, ORIGINAL, SAMPLES


@dataclass(frozen=True)
class Task:
    """A row: what is narrowed, how, and for how many epochs it is trained."""

    network: str
    method: str
    epochs: int
    seed: int
    data: Path
    weights: Path
    state: Path  # the file from which the row continues if it was stopped
    threads: int
    bf16: bool
    compiled: bool = False


def findings(task: Task) -> Iterator[Finding]:
    """All findings of a row. If it fails, the last one has the error."""
    return caught(_findings(task))


def _findings(task: Task) -> Iterator[Finding]:
    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    yield {"stage": "load", "torch": torch.__version__, "machine": machine(), "bf16": task.bf16}
    network = published.NETWORKS[task.network]
    model = network.build().eval()
    metadata = load_checkpoint(published.find_weights(network, task.weights), model)
    images, labels = data.DATASETS[network.dataset](task.data, "train")
    mean, std = data.mean_and_std(metadata)
    run = training.Training(images, labels, mean, std, task.epochs, task.state, task.seed, task.bf16, task.compiled)
    calibration = data.normalise(images[:SAMPLES], mean, std)
    before = size(Specimen(model, (calibration[:1],)))
    yield {"train_images": len(images), "stage": "train"}
    start = time.process_time()
    small = trained(task, model, calibration, run).eval()
    seconds, after = time.process_time() - start, size(Specimen(small, (calibration[:1],)))
    yield {"seconds": seconds, "parameters": after[0] / before[0], "flops": after[1] / before[1], "stage": "evaluate"}
    test, answers = published.images(network, metadata, task.data, "test")
    yield {"accuracy": data.accuracy(small, test, answers), "test_images": len(test), "stage": "done"}
    task.state.unlink(missing_ok=True)


def trained(task: Task, model: nn.Module, calibration: Tensor, run: training.Training) -> nn.Module:
    """The network of a row: narrowed by its method, and trained for its epochs."""
    if task.method == ORIGINAL:
        return model
    method = METHODS[task.method]
    options = {"budget": {"flops": NETWORKS[task.network]}, "seed": task.seed, **method.options}
    if method.shrunk:
        return training.while_shrinking(model, calibration[:2], run, **options)
    refitted = options.get("refit") == "calibration"
    result = fxmerge.merge(model, calibration[:2], calibration=calibration.split(64) if refitted else None, **options)
    if not run.epochs:
        return result.module
    if method.distilled:
        return training.towards(result, run)
    assert result.model is not None  # the networks of the tables build their layers with attributes that follow
    return training.with_labels(result.model.to(memory_format=torch.channels_last), run)
