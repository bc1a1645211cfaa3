"""Neuron Merging as it was published, on networks with one path: Python loops over channels, for comparison only.

Each layer whose outputs one other layer reads keeps the largest l1 norms; each dropped channel goes to the kept one
that is most like it (Kim et al., NeurIPS 2020, Algorithms 1 to 3), with the published code's scales.
"""

import copy
import re
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.speed.vgg16 import Array, absorb, scale_matrix

Chain = tuple[str, str | None, str]  # layer, the BatchNorm behind it, the layer that reads both


def chains(model: nn.Module) -> list[Chain]:
    """The layers that lose channels: linear ones in a row, or the first convolution of each residual block."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = [m[1] for name, _ in model.named_modules() if (m := re.fullmatch(r"(layer\d\.\d+)\.conv1", name))]
    if blocks:
        return [(f"{b}.conv1", f"{b}.bn1", f"{b}.conv2") for b in blocks]
    return [(one, None, other) for one, other in pairwise(linear)]


def largest(layer: nn.Module, count: int) -> np.ndarray:  # type: ignore[type-arg]
    """The channels that stay: largest l1 norms, of equal ones the later, a bias being one more column."""
    rows = layer.weight.detach().flatten(1)  # type: ignore[operator,union-attr]
    if isinstance(layer, nn.Linear):
        rows = torch.cat([rows, layer.bias.detach()[:, None]], 1)
    return np.sort(np.argsort(torch.norm(rows, 1, 1).numpy(), kind="stable")[::-1][:count])


def plain_scale_matrix(rows: Array, kept: np.ndarray, threshold: float) -> np.ndarray:  # type: ignore[type-arg]
    """(n, k) without a BatchNorm: cosines alone, rows with the bias as their last column."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike, scale = unit @ unit.T, np.zeros((len(rows), len(kept)))
    for i, row in enumerate(rows):
        if i in kept:
            scale[i, np.where(kept == i)[0]] = 1
            continue
        best = int(np.argmax(alike[i][kept]))
        if alike[i][kept][best] >= threshold:
            scale[i, best] = np.linalg.norm(row) / np.linalg.norm(rows[kept[best]])
    return scale


@torch.no_grad()
def neuron_merging(model: nn.Module, counts: Mapping[str, int], threshold: float, merge: bool = True) -> nn.Module:
    """A smaller copy of the model: {layer: channels kept}. Without `merge` channels are dropped, no more."""
    small = copy.deepcopy(model)
    for name, norm_name, reader_name in chains(model):
        layer, consumer = small.get_submodule(name), small.get_submodule(reader_name)
        kept = largest(model.get_submodule(name), counts[name])
        rows = model.get_submodule(name).weight.detach().flatten(1)  # type: ignore[operator,union-attr]
        if not merge:
            scale = np.eye(len(rows))[:, kept]
        elif norm_name is None:
            bias = model.get_submodule(name).bias.detach()[:, None]  # type: ignore[index,operator,union-attr]
            scale = plain_scale_matrix(torch.cat([rows, bias], 1).numpy(), kept, threshold)
        else:
            scale = scale_matrix(rows.numpy(), kept, model.get_submodule(norm_name), threshold)  # type: ignore[arg-type]
        index = torch.from_numpy(kept)
        _narrow(layer, {n: getattr(layer, n)[index] for n in ("weight", "bias") if getattr(layer, n) is not None})
        if norm_name is not None:
            norm = small.get_submodule(norm_name)
            held = ("weight", "bias", "running_mean", "running_var")
            _narrow(norm, {n: getattr(norm, n)[index] for n in held})
        _narrow(consumer, {"weight": absorb(consumer.weight, torch.from_numpy(scale).float())})  # type: ignore[arg-type]
    return small


def _narrow(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        is_parameter = isinstance(getattr(module, name), nn.Parameter)
        setattr(module, name, nn.Parameter(value) if is_parameter else value)
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.num_features = len(weight)
