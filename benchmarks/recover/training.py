"""Fine-tuning: SGD with the labels, with `fxmerge.distill`, or with `fxmerge.Shrinker`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from benchmarks.networks.data import normalise
from benchmarks.networks.train import augment
from fxmerge.training import checkpoint

LR, MOMENTUM, WEIGHT_DECAY, BATCH = 0.05, 0.9, 5e-4, 128
SHORT, SHORT_LR = 4, 1e-4  # distilling for fewer epochs: AdamW, its learning rate for one epoch
OWN_LR = 0.005  # of longer distilling, for each epoch; at most LR


@dataclass(frozen=True)
class Training:
    """The images of a training, and what it depends on beside them.

    images: uint8 (N, H, W, C); labels: (N,); mean, std: one entry for each channel
    epochs: the learning rate falls from LR to zero over them by half a cosine
    state:  the file from which a training that was stopped continues
    compiled: whether models run through torch.compile
    """

    images: Tensor
    labels: Tensor
    mean: list[float]
    std: list[float]
    epochs: int
    state: Path
    seed: int = 0
    bf16: bool = False
    compiled: bool = False

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.images) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, in random order: images (N, C, H, W), cropped and mirrored at random, and labels."""
        for index in torch.randperm(len(self.images)).split(BATCH):
            inputs = normalise(augment(self.images[index]), self.mean, self.std)
            yield inputs.contiguous(memory_format=torch.channels_last), self.labels[index]


def sgd(parameters: Any, lr: float = LR) -> torch.optim.SGD:
    """The optimizer of all methods, but for a short distilling."""
    return torch.optim.SGD(parameters, lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def with_labels(model: nn.Module, training: Training) -> nn.Module:
    """Trains a model with the labels, or goes on where a training was stopped."""
    optimizer, begun = sgd(model.parameters()), 0
    if training.state.exists():
        begun = checkpoint.restore(training.state, {"model": model}, optimizer)["epochs"]
    run: Any = torch.compile(model) if training.compiled else model
    for epoch in range(begun, training.epochs):
        for _ in steps(run, optimizer, training, epoch):
            pass
        checkpoint.save(training.state, {"model": model}, optimizer, {"epochs": epoch + 1})
    return model


def while_shrinking(model: nn.Module, example: Tensor, training: Training, **options: Any) -> nn.Module:
    """Trains a model with the labels and narrows it over the first half of the epochs. A stop loses its progress."""
    first = math.ceil(training.epochs / 2)
    shrinker = fxmerge.Shrinker(model, example, steps=first * len(training), **options)
    optimizer = sgd(model.parameters())
    for epoch in range(first):
        for _ in steps(model, optimizer, training, epoch):
            shrinker.step()
    small = shrinker.finish(optimizer).model
    assert small is not None  # finish raises if the class does not take the narrowed layers
    for epoch in range(first, training.epochs):
        for _ in steps(small, optimizer, training, epoch):
            pass
    return small


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, training: Training, epoch: int) -> Iterator[None]:
    """One epoch of training with the labels; yields after each step."""
    torch.manual_seed(training.seed + epoch)
    model.train()
    for number, (inputs, labels) in enumerate(training):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * LR * (1 + math.cos(math.pi * (epoch + number / len(training)) / training.epochs))
        with torch.autocast("cpu", torch.bfloat16, enabled=training.bf16):
            loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def towards(result: fxmerge.Result, training: Training) -> nn.Module:
    """Trains a merged model towards its original on means of two images, without labels.

    A short training with batch statistics, or with SGD, would end farther from the original (docs/experiments.md).
    """
    epochs = training.epochs
    how: dict[str, Any] = {"lr": SHORT_LR * math.sqrt(epochs)}
    if epochs >= SHORT:
        how = {"optimizer": lambda weights: sgd(weights, min(LR, OWN_LR * epochs)), "batch_statistics": True}
    trained = fxmerge.distill(
        result, training, epochs=epochs, hidden=0.0, mix=True, bf16=training.bf16, compile=training.compiled,
        checkpoint=training.state, seed=training.seed, **how,
    )  # fmt: skip
    return trained.module
