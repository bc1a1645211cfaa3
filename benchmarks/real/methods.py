"""What benchmarks.real measures: the budgets, and the methods that make a network smaller."""

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fxmerge
from benchmarks.coverage.zoo import Specimen
from benchmarks.peers import torch_pruning as peer

ORIGINAL = "original"
PEER = "torch-pruning"
SAMPLES = 128  # calibration samples
OUTPUT = "is the model's output"  # the reason with which fxmerge declines to change a layer that writes the output


@dataclass(frozen=True)
class Budget:
    """How much of a network may remain: a share of the channels in each group, or a share of the whole FLOPs."""

    title: str
    options: Mapping[str, Any]  # of fxmerge.merge


def _flops(share: float, allocation: str) -> Budget:
    return Budget(f"{share:.0%} of the FLOPs, {allocation}", {"budget": {"flops": share}, "allocation": allocation})


# in the order in which they are measured
BUDGETS: Mapping[str, Budget] = {
    "ratio-0.1": Budget("ratio 0.1", {"ratio": 0.1}),
    "ratio-0.3": Budget("ratio 0.3", {"ratio": 0.3}),
    "flops-0.7-greedy": _flops(0.7, "greedy"),
    "flops-0.7-uniform": _flops(0.7, "uniform"),
    "ratio-0.5": Budget("ratio 0.5", {"ratio": 0.5}),
    "flops-0.5-greedy": _flops(0.5, "greedy"),
    "flops-0.5-uniform": _flops(0.5, "uniform"),
}


@dataclass(frozen=True)
class Task:
    """The arguments of every method."""

    specimen: Specimen
    budget: Budget
    seed: int
    calibration: Any  # batches, for methods in WITH_SAMPLES


Method = Callable[[Task], tuple[nn.Module, float]]  # the smaller network, and CPU seconds


def _by_fxmerge(**options: Any) -> Method:
    """A method that merges with these options."""

    def run(task: Task) -> tuple[nn.Module, float]:
        fxmerge.merge(nn.Linear(4, 4), torch.zeros(1, 4))  # imports what fxmerge imports on first use
        settings = fxmerge.Options(scope="all", seed=task.seed, **task.budget.options, **options)
        start = time.process_time()
        merged = fxmerge.merge(task.specimen.model, task.specimen.inputs, settings, calibration=task.calibration)
        return merged.module.eval(), time.process_time() - start

    return run


def _by_torch_pruning(task: Task) -> tuple[nn.Module, float]:
    """Prune with Torch-Pruning. The layers that write the network's output are found by fxmerge and left alone.

    Ratios and `uniform` prune every layer alike, `greedy` ranks all channels of the network together.
    """
    model, options = task.specimen.model, task.budget.options
    refusals = fxmerge.analyze(model, task.specimen.inputs).refusals
    layers = dict(model.named_modules())
    ignore = [layers[r.name] for r in refusals if r.reason == OUTPUT and r.name in layers]
    suite = type(model).__module__.partition(".")[0]
    start = time.process_time()
    if "ratio" in options:
        peer.prune(task.specimen, suite, options["ratio"], ignore)
    else:
        together = options["allocation"] == "greedy"
        peer.prune_to_flops(task.specimen, suite, options["budget"]["flops"], together, ignore=ignore)
    return model, time.process_time() - start


METHODS: Mapping[str, Method] = {
    ORIGINAL: lambda task: (task.specimen.model, 0.0),
    "prune": _by_fxmerge(refit="none", decomposition="prune", selection="l2"),
    "mostsim": _by_fxmerge(refit="none", decomposition="mostsim"),
    "default": _by_fxmerge(),
    "samples": _by_fxmerge(),
    PEER: _by_torch_pruning,
}
WITH_SAMPLES = ("samples",)


def installed(method: str) -> bool:
    """Whether the package that a method needs is installed."""
    return method != PEER or importlib.util.find_spec("torch_pruning") is not None
