"""Rotates groups whose paths are linear: their channels become others, and the model computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group
from fxmerge.methods.linalg import precise
from fxmerge.weights.by_path import Weights
from fxmerge.weights.copy import sharing_copy
from fxmerge.weights.layout import columns, from_columns, from_out_first, out_first


def rotated(captured: Capture, rotations: Sequence[tuple[Group, Tensor]]) -> Capture:
    """A capture of the same graph in which each group's channels x are B x, for orthogonal B (strands, n, n).

    The rows of producers become B rows, and the columns of consumers W B'. Tensors that do not change are shared with
    the original's graph module.
    """
    if not rotations:
        return captured
    module, weights = sharing_copy(captured.module)
    with torch.no_grad():
        for group, rotation in rotations:
            _rotate(weights, group, rotation)
    return replace(captured, module=module)


def _rotate(weights: Weights, group: Group, rotation: Tensor) -> None:
    done: set[tuple[str, bytes]] = set()
    for producer, strands in zip(group.producers, group.strands.producers, strict=True):
        if producer.place in done:
            continue  # a module that is called twice
        done.add(producer.place)
        weight, own = weights.own(producer.layer.params["weight"]), _own(rotation, producer.channels, strands)
        first = out_first(weight, producer.layer)
        rows = precise(first.flatten(1)).clone()
        rows[producer.where] = torch.einsum("ckm,mcx->kcx", own.to(rows), rows[producer.where])
        weight.copy_(from_out_first(rows.reshape(first.shape), weight, producer.layer))
        if "bias" in producer.layer.params:
            bias = weights.own(producer.layer.params["bias"])
            constants = precise(bias).clone()
            constants[producer.where] = torch.einsum("ckm,mc->kc", own.to(constants), constants[producer.where])
            bias.copy_(constants)
    done = set()
    for consumer, strands in zip(group.consumers, group.strands.consumers, strict=True):
        if consumer.place in done:
            continue
        done.add(consumer.place)
        weight, own = weights.own(consumer.layer.params["weight"]), _own(rotation, consumer.channels, strands)
        read = precise(columns(weight, consumer.layer)).clone()
        read[consumer.where] = torch.einsum("ckm,mcx->kcx", own.to(read), read[consumer.where])
        weight.copy_(from_columns(read, weight, consumer.layer))


def _own(rotation: Tensor, channels: Tensor, strands: Sequence[int]) -> Tensor:
    """B of each copy of some channels, (copies, m, m)."""
    return rotation[list(strands)][:, channels][:, :, channels]
