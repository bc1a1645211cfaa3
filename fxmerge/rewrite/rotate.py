"""Rotates groups whose paths are linear: their channels become others, and the model computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Member
from fxmerge.methods.linalg import precise
from fxmerge.weights.by_path import Weights
from fxmerge.weights.copy import sharing_copy
from fxmerge.weights.factors import gain_of, slot_of
from fxmerge.weights.layout import columns, from_columns, from_out_first, out_first


def rotated(captured: Capture, rotations: Sequence[tuple[Group, Tensor]]) -> Capture:
    """A capture of the same graph in which each group's channels x are B x, for orthogonal B (strands, n, n).

    The rows of producers become B G rows, and the columns of consumers W G B', with the gains G of the group's factors,
    which become 1. Tensors that do not change are shared with the original's graph module.
    """
    if not rotations:
        return captured
    module, weights = sharing_copy(captured.module)
    with torch.no_grad():
        for group, rotation in rotations:
            norms = _batch_norms(weights, group, rotation[0])
            _rotate_layers(weights, group, rotation)
            _rotate_factors(weights, group, rotation[0])
            for member, tensors in norms:
                for slot, value in tensors.items():
                    _put(weights, member, slot, value)
    return replace(captured, module=module)


def _rotate_layers(weights: Weights, group: Group, rotation: Tensor) -> None:
    factors, strands = group.factors, group.strands
    for producer, copies, own in _once(group.producers, strands.producers, factors.producers):
        mixing = _mixing(weights, group, rotation[list(copies)], producer, own)
        weight = weights.own(producer.layer.params["weight"])
        first = out_first(weight, producer.layer)
        rows = _mixed(first.flatten(1), producer, mixing)
        weight.copy_(from_out_first(rows.reshape(first.shape), weight, producer.layer))
        if "bias" in producer.layer.params:
            bias = weights.own(producer.layer.params["bias"])
            bias.copy_(_mixed(bias[:, None], producer, mixing)[:, 0])
    for consumer, copies, own in _once(group.consumers, strands.consumers, factors.consumers):
        mixing = _mixing(weights, group, rotation[list(copies)], consumer, own)
        weight = weights.own(consumer.layer.params["weight"])
        read = _mixed(columns(weight, consumer.layer), consumer, mixing)
        weight.copy_(from_columns(read, weight, consumer.layer))


def _rotate_factors(weights: Weights, group: Group, rotation: Tensor) -> None:
    """What is added to the channels is rotated; gains become 1, and a norm's bias b becomes B (b / gain)."""
    factors = group.factors
    moved = {m.place: m for own in (*factors.producers, *factors.consumers) for m in own if m.layer.op != "batch_norm"}
    for added in {m.place: m for m in factors.added}.values():
        value = weights.own(added.layer.params["weight"])
        copies = rotation.expand(added.where.size(1), -1, -1)
        value.copy_(_mixed(value.reshape(-1, 1), added, copies).view(value.shape))
    for member in moved.values():
        if "bias" in member.layer.params:
            gain = gain_of([member], weights.__getitem__, group.channels)
            constant = slot_of(member, "bias", weights.__getitem__, group.channels)
            _put(weights, member, "bias", rotation @ torch.where(constant == 0, 0.0, constant / gain))
    for member in moved.values():
        _put(weights, member, "weight", torch.ones(group.channels, dtype=torch.float64))


def _batch_norms(weights: Weights, group: Group, rotation: Tensor) -> list[tuple[Member, dict[str, Tensor]]]:
    """The BatchNorms among the factors, and what they become: with gains of 1, and with the statistics of the rotated
    channels. How channels vary together is not stored; their correlations are taken to be those of the layer's rows.
    """
    found = []
    for producer, _, own in _once(group.producers, group.strands.producers, group.factors.producers):
        for number, member in enumerate(own):
            if not member.layer.has_running_statistics:
                continue
            later = gain_of(own[number + 1 :], weights.__getitem__, group.channels)
            gain = later * gain_of([member], weights.__getitem__, group.channels)
            mean, variance, constant = (
                slot_of(member, slot, weights.__getitem__, group.channels)
                for slot in ("running_mean", "running_var", "bias")
            )
            rows = precise(out_first(weights[producer.layer.params["weight"]], producer.layer).flatten(1)).cpu()
            unit = torch.nn.functional.normalize(rows[producer.where[:, 0]], dim=1)
            unit = rotation * (gain * variance.clamp(min=0).sqrt()) @ unit
            variance = unit.square().sum(1)
            weight = (variance + member.layer.eps).sqrt()
            tensors = {"running_mean": rotation @ (gain * mean), "running_var": variance}
            found.append((member, {**tensors, "weight": weight, "bias": rotation @ (later * constant)}))
    return found


def _put(weights: Weights, member: Member, slot: str, value: Tensor) -> None:
    """Writes one tensor of a factor, by channel (n,)."""
    tensor = weights.own(member.layer.params[slot])
    own = value[member.channels].to(tensor)
    index = member.where[:, 0].to(tensor.device)
    tensor.copy_(tensor.detach().flatten().index_put((index,), own).view(tensor.shape))


def _mixing(weights: Weights, group: Group, rotation: Tensor, member: Member, own: Sequence[Member]) -> Tensor:
    """B G for each copy of a member's channels, (copies, m, m), with the gains G of the factors that move into it."""
    within = rotation[:, member.channels][:, :, member.channels]
    return within * gain_of(own, weights.__getitem__, group.channels)[member.channels] if own else within


def _mixed(rows: Tensor, member: Member, mixing: Tensor) -> Tensor:
    """Rows (places, x), in float64, of which those of a member's channels are mixed, copy by copy."""
    found = precise(rows).clone()
    found[member.where] = torch.einsum("ckm,mcx->kcx", mixing.to(found), found[member.where])
    return found


def _once(
    members: Sequence[Member], strands: Sequence[tuple[int, ...]], factors: Sequence[tuple[Member, ...]]
) -> list[tuple[Member, tuple[int, ...], tuple[Member, ...]]]:
    """Each layer once, however often it is called."""
    parts = zip(members, strands, factors or [()] * len(members), strict=True)
    return list({member.place: (member, copies, own) for member, copies, own in parts}.values())
