"""What benchmarks.language measures: the methods that remove a share of the decoder layers' parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fxmerge
from benchmarks.language.llama import LAYERS
from benchmarks.language.pruning import Choice, flap, prune, second_order, wanda
from benchmarks.language.slicegpt import sliced_width, slicegpt

DENSE = "dense"
REMOVED = (0.2, 0.3, 0.5)  # shares of the parameters of the decoder layers
SAMPLES = 128  # calibration windows
WINDOWS = 24  # windows of the test text


@dataclass(frozen=True)
class Task:
    """The arguments of every method."""

    model: nn.Module  # may be changed in place
    batches: Sequence[Mapping[str, Tensor]]  # calibration tokens
    removed: float
    seed: int


Method = Callable[[Task], nn.Module]


def _by_pruning(choice: Choice) -> Method:
    return lambda task: prune(task.model, task.batches, task.removed, choice)


def _by_slicegpt(task: Task) -> nn.Module:
    return slicegpt(task.model, task.batches, sliced_width(task.model, task.removed))


def _by_fxmerge(task: Task, samples: bool) -> nn.Module:
    """fxmerge with a budget. Its example input is the first calibration window; without samples it sees no other."""
    example = {name: value[:1] for name, value in task.batches[0].items()}
    options = fxmerge.Options(budget={"params": 1 - task.removed}, of=(f"{LAYERS}*",), seed=task.seed)
    batches = list(task.batches) if samples else None
    return fxmerge.merge(task.model, example, options, calibration=batches).module.eval()


METHODS: Mapping[str, Method] = {
    DENSE: lambda task: task.model,
    "wanda": _by_pruning(wanda),
    "flap": lambda task: flap(task.model, task.batches, task.removed),
    "second-order": _by_pruning(second_order),
    "slicegpt": _by_slicegpt,
    "fxmerge": partial(_by_fxmerge, samples=True),
    "fxmerge-no-data": partial(_by_fxmerge, samples=False),
}


def warm_up() -> None:
    """Import what fxmerge imports on first use, so that it is not measured."""
    fxmerge.merge(nn.Linear(4, 4), torch.zeros(1, 4))
