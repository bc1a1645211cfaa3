"""Rules of ops that move whole channels to other channels or places: channel_shuffle, pixel_shuffle, fold."""

from __future__ import annotations

import torch
from torch import nn

from fxmerge.ir.labels import simplify, spread, thin, varying
from fxmerge.ir.provenance import Lab
from fxmerge.rules.context import RuleContext
from fxmerge.rules.movement import execute
from fxmerge.rules.rule import Answer, Operand, Unknown


def channel_shuffle(ctx: RuleContext, input: Operand, groups: int) -> Answer:
    """Channel i of each of `groups` blocks goes next to channel i of the others; all blocks must lose equally many."""
    if isinstance(input, Lab) and 1 in varying(input.t):
        ctx.block(ctx.along(input, 1).view(groups, -1))
    return execute(ctx, input) if isinstance(ctx.target, nn.Module) else execute(ctx, input, groups)


def pixel_shuffle(ctx: RuleContext, input: Operand, upscale_factor: int) -> Answer:
    """The r * r channels that give the pixels of one channel are dropped together, and are one channel afterwards."""
    if not isinstance(input, Lab) or ctx.shape is None or input.t.dim() < 3:
        return Unknown("does not rearrange the channels of an image")
    if input.t.dim() - 3 not in varying(input.t):
        return execute(ctx, input) if isinstance(ctx.target, nn.Module) else execute(ctx, input, upscale_factor)
    phases = torch.unflatten(thin(input.t), -3, (-1, upscale_factor**2))
    first = phases.select(-3, 0)
    ctx.tie(first.unsqueeze(-3).expand_as(phases), phases)
    for axis in (-2, -1):
        first = first.repeat_interleave(upscale_factor, axis) if first.size(axis) > 1 else first
    return Lab(simplify(first.expand(ctx.shape)))


def fold(ctx: RuleContext, input: Operand, *sizes: Operand, **kwargs: Operand) -> Lab | Unknown:
    """Patches (n, channels * places, patches) are summed into an image: the places of one channel become one."""
    if not isinstance(input, Lab) or input.t.dim() != 3 or ctx.shape is None or set(varying(input.t)) - {1}:
        return Unknown("does not sum patches of channels")
    labels = ctx.along(input, 1).view(ctx.shape[1], -1)
    ctx.tie(labels[:, :1].expand_as(labels), labels)
    return Lab(spread(labels[:, 0], ctx.shape, 1))
