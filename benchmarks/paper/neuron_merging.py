"""The published Neuron Merging algorithm (Kim et al., NeurIPS 2020, Algorithms 1 to 3), for comparison only.

Like the published code, it loops over channels in Python and merges layers with a single consumer. A layer keeps the
channels with the largest l1 norms; every dropped channel is added to the most similar kept channel, with the scale of
the published code.
"""

import copy
import re
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float32]
Chain = tuple[str, str | None, str]  # producer, the BatchNorm after it, consumer

LAM = 0.85


def chains(model: nn.Module) -> list[Chain]:
    """The layers that lose channels: consecutive linear layers, or the first convolution of each residual block."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = [m[1] for name, _ in model.named_modules() if (m := re.fullmatch(r"(layer\d\.\d+)\.conv1", name))]
    if blocks:
        return [(f"{b}.conv1", f"{b}.bn1", f"{b}.conv2") for b in blocks]
    return [(one, None, other) for one, other in pairwise(linear)]


def largest(layer: nn.Module, count: int) -> np.ndarray:  # type: ignore[type-arg]
    """The `count` channels with the largest l1 norms, in ascending order; of equal norms the later channels.

    The bias of a linear layer counts as one more column of its weight.
    """
    rows = layer.weight.detach().flatten(1)  # type: ignore[operator,union-attr]
    if isinstance(layer, nn.Linear):
        rows = torch.cat([rows, layer.bias.detach()[:, None]], 1)
    return np.sort(np.argsort(torch.norm(rows, 1, 1).numpy(), kind="stable")[::-1][:count])


def absorb(weight: Tensor, up: Tensor) -> Tensor:
    """Absorb a scale matrix `up` (n, k) in the consumer's `weight` (out, n, ...): returns (out, k, ...).

    Works on one filter after the other, like the published code.
    """
    out = torch.empty(len(weight), up.size(1), *weight.shape[2:])
    for i, one in enumerate(weight):
        out[i] = torch.mm(up.T, one.reshape(len(up), -1)).view(out.shape[1:])
    return out


def scale_matrix(rows: Array, kept: NDArray[np.int64], norm: nn.BatchNorm2d, threshold: float) -> NDArray[np.float64]:
    """The scale matrix (n, k) of a convolution with a BatchNorm, with the S and B of the published code.

    Row i has the scale at the kept channel that channel i is added to; it is zero if channel i is dropped.
    """
    buffers = norm.weight, norm.bias, norm.running_mean, norm.running_var
    gamma, beta, mean, var = (t.detach().numpy() for t in buffers if t is not None)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    apart = 1 - unit @ unit.T
    scale = np.zeros((len(rows), len(kept)))
    for i, row in enumerate(rows):
        if i in kept:  # the published code searches the array twice, too
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


def plain_scale_matrix(rows: Array, kept: np.ndarray, threshold: float) -> np.ndarray:  # type: ignore[type-arg]
    """The scale matrix (n, k) without a BatchNorm, from cosine similarity alone; `rows` end with the bias."""
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
    """A smaller copy of the model, with `counts[layer]` channels kept. With `merge=False` channels are only dropped."""
    small = copy.deepcopy(model)
    for name, norm_name, consumer_name in chains(model):
        layer, consumer = small.get_submodule(name), small.get_submodule(consumer_name)
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
