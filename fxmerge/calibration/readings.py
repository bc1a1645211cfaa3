"""The survey: the second moments of the consumers' patches, from one run of the original on refit's batches.

The `repair` selection chooses channels by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.epilogue import epilogue_of, pair
from fxmerge.calibration.paired_run import PairedRun, Settings, Visit, line
from fxmerge.calibration.patches import enough, form_of, input_of, matrices_of, patches, sample
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group
from fxmerge.ir.provenance import Layer, Provenance, batch_norms
from fxmerge.methods.evidence import Moments, Reading
from fxmerge.methods.generalisation import independent_rows, pieces
from fxmerge.methods.least_squares import Reduce, second_moments
from fxmerge.weights.by_path import at
from fxmerge.weights.disk_tensor import beside

Half = tuple[float, Tensor, Tensor]  # rows, mean (g, p) and second moments (g, p, p) of half of the samples
WIDEST = 8192  # columns of a consumer's patches, all its blocks together; a consumer with more is left out


def readings(
    captured: Capture,
    facts: Provenance,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
    stage: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[Reading, ...]]:
    """Group name -> how its consumers read it. Consumers that are not layers, as attention scores, are left out."""
    consumers: dict[str, list[tuple[Group, int, Any]]] = {}
    for group in groups:
        for number, member in enumerate(group.consumers):
            consumers.setdefault(member.layer.node, []).append((group, number, member))
    found: dict[str, list[Reading]] = {g.name: [] for g in groups}
    module = captured.module
    norms = batch_norms(facts)
    generator = torch.Generator().manual_seed(settings.seed)
    with evaluating(module), torch.no_grad():
        run = PairedRun(pair(module, facts), batches, settings)
        for visit in run:
            members = consumers.get(visit.node.name, ())
            if not members:
                continue
            layer = members[0][2].layer
            stage(f"survey {layer.module}")
            made = _consumer(run, visit, layer, norms=norms, settings=settings, generator=generator)
            if made is None:
                continue
            reading, width, halves = made
            for group, number, member in members:
                columns = (member.where[:, :, None] * width + torch.arange(width)).flatten(1)
                own = replace(reading, channels=member.channels, columns=columns, consumer=number)
                found[group.name].append(replace(own, moments=_of_channels(halves, columns)))
    return {name: tuple(parts) for name, parts in found.items()}


def _consumer(
    run: PairedRun, visit: Visit, layer: Layer, *, norms: dict[str, Layer], settings: Settings,
    generator: torch.Generator,
) -> tuple[Reading, int, list[Half]] | None:  # fmt: skip
    """The reading of all channels together, the number of columns for each input channel, and the moments of halves.

    The weight is multiplied by the gain of the norm after it.
    None where the geometry of the call is unknown, patches are wider than WIDEST, or inputs are not finite.
    """
    module, node, outputs = run.original.module, visit.node, visit.outputs
    owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    weight = at(module, layer.params["weight"])
    form = form_of(node, layer, owner, weight)
    if form is None:
        return None
    rows = matrices_of(weight, form).double()
    blocks, width = form.groups, rows.size(2)
    if blocks * width > WIDEST:
        return None
    index_of = sample(outputs, form, enough(settings.rows, blocks * width), generator, settings.reduce)
    inputs = run.original.values[input_of(node, layer.op).name]
    parts = [patches(x, form, index) for x, index in zip(inputs, index_of, strict=True)]
    halves = [_half(parts, number, settings.reduce) for number in range(2)]
    mean, second = _joined(halves)
    gram = _diagonal(second)
    if not bool(torch.isfinite(gram).all()):
        return None
    whole = _diagonal(rows)
    norm = epilogue_of(module, node, norms, set()).norm
    if norm is not None:
        whole = whole * line(module, norm, *run.statistics(norm, outputs))[0][:, None]
    assert layer.reads is not None
    each = blocks * width // layer.reads.numel()
    reading = Reading(
        gram=beside(weight, gram.cpu()),
        weight=beside(weight, whole.cpu()),
        channels=torch.arange(0),
        columns=torch.zeros(0, each, dtype=torch.int64),
        independent=independent_rows(parts, mean, second, settings.reduce),
    )
    return reading, each, halves


def _half(parts: list[Tensor], number: int, reduce: Reduce) -> Half:
    """The moments of every second of the pieces of consecutive patches, which are in the order of samples."""
    own = [part for piece in pieces(parts)[number::2] for part in piece] or [parts[0][:0]]
    count = float(reduce(own[0].new_tensor(float(sum(map(len, own))), dtype=torch.float64)))
    if count == 0:  # one row in all
        return 0.0, *second_moments(parts, reduce)
    return count, *second_moments(own, reduce)


def _joined(halves: list[Half]) -> tuple[Tensor, Tensor]:
    """The mean and the second moments about it of both halves together."""
    (one, mean, second), (two, other_mean, other) = halves
    share, apart = one / (one + two), mean - other_mean
    joined = share * second + (1 - share) * other + share * (1 - share) * apart[:, :, None] * apart[:, None, :]
    return share * mean + (1 - share) * other_mean, joined


def _of_channels(halves: list[Half], columns: Tensor) -> Moments:
    """The moments of channels with these columns (m, q), over all their columns, from those of patches."""
    found = []
    for count, mean, second in halves:
        width = mean.size(1)
        block, inner = columns // width, columns % width
        level = mean.cpu().flatten()[columns].mean(1)
        total = torch.zeros(len(level), len(level), dtype=torch.float64)
        for part, place in zip(block.T, inner.T, strict=True):
            off = mean.cpu()[part, place] - level
            same = part[:, None] == part[None, :]  # patches of different blocks have no moments in common
            total += torch.where(same, second.cpu()[part[:, None], place[:, None], place[None, :]], 0) + torch.outer(
                off, off
            )
        found.append((count, level, total / columns.size(1)))
    parts = [(n, level[None], total[None]) for n, level, total in found]
    mean, covariance = _joined(parts)
    return Moments(mean[0], covariance[0], (found[0][1:], found[1][1:]))


def _diagonal(blocks: Tensor) -> Tensor:
    """Blocks (g, a, b) as one matrix (g a, g b) that has them on its diagonal."""
    g, a, b = blocks.shape
    whole = blocks.new_zeros(g, a, g, b)
    whole[torch.arange(g), :, torch.arange(g)] = blocks
    return whole.view(g * a, g * b)
