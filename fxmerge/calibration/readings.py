"""The survey: second moments of the consumers' patches and of scores, from one run of the original on refit's batches.

An expert reads its channels on the rows that are sent to it.

The `repair` selection chooses channels by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.decided import expert_rows, is_routed, real_rows, routed_operands, rows_of
from fxmerge.calibration.epilogue import epilogue_of, pair
from fxmerge.calibration.held_out import samples
from fxmerge.calibration.paired_run import PairedRun, Settings, Visit, line
from fxmerge.calibration.patches import Form, enough, form_of, input_of, matrices_of, patches, sample
from fxmerge.calibration.recurrent_readings import recurrent_readings
from fxmerge.calibration.salience import salience
from fxmerge.calibration.score_readings import score_reading, scores_of
from fxmerge.calibration.tail import shaped
from fxmerge.calibration.work import shares_of_work
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Member
from fxmerge.ir.provenance import Layer, Provenance, batch_norms
from fxmerge.methods.evidence import Reading
from fxmerge.methods.generalisation import independent_rows
from fxmerge.methods.least_squares import second_moments
from fxmerge.progress import Stage, silent
from fxmerge.weights.by_path import at
from fxmerge.weights.stored_tensor import beside

WIDE = 1024  # columns of a consumer's patches from which their second moments are kept in float32
WIDEST = 8192  # columns of a consumer's patches, all its blocks together; a consumer with more is left out


@dataclass(frozen=True)
class _Moments:
    """Of the patches of one input: as in `Reading`."""

    gram: Tensor
    mean: Tensor
    independent: float
    finite: bool


def readings(
    captured: Capture,
    facts: Provenance,
    grouping: Grouping,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
    stage: Stage = silent,
) -> dict[str, tuple[Reading, ...]]:
    """Group name -> how its consumers read it, and how attention scores sum channels that no layer reads."""
    consumers: dict[str, list[tuple[Group, int, Any]]] = {}
    for group in groups:
        for number, member in enumerate(group.consumers):
            consumers.setdefault(member.layer.node, []).append((group, number, member))
    found: dict[str, list[Reading]] = {g.name: [] for g in groups}
    module = captured.module
    norms, scored = batch_norms(facts), scores_of(module.graph, facts, grouping, groups)
    known: dict[tuple[str, Form], _Moments] = {}
    generator = torch.Generator().manual_seed(settings.seed)
    done = shares_of_work(facts, module, sum(map(samples, batches)), settings)
    layers = {name: members[0][2].layer for name, members in consumers.items()}
    salient = salience(captured, facts, layers, batches, settings)
    with evaluating(module), torch.no_grad():
        run = PairedRun(pair(module, facts), batches, settings)
        for name in consumers:
            index = rows_of(run.original.named[name], facts)
            if index is not None:
                run.original.keep([index.name], name)
        for visit in run:
            for scores in scored.get(visit.node.name, ()):
                stage(f"survey {visit.node.name}", done.get(visit.node.name, 0.0))
                of_scores = score_reading(run, scores)
                found[scores.group.name] += [of_scores] if of_scores is not None else []
            members = consumers.get(visit.node.name, ())
            if not members:
                continue
            layer = members[0][2].layer
            stage(f"survey {layer.module}", done[layer.node])
            if layer.operation.is_recurrent:
                for name, reading in recurrent_readings(run, visit, members, settings):
                    found[name].append(reading)
                continue
            if is_routed(layer, facts):
                for group, number, member in members if layer.reads_apart else ():
                    found[group.name] += _of_experts(run, visit, layer, member, number, settings)
                continue
            made = _consumer(
                run, visit, layer, norms=norms, settings=settings, generator=generator, known=known,
                salient=salient.get(layer.node),
            )  # fmt: skip
            if made is None:
                continue
            reading, width = made
            for group, number, member in members:
                columns = (member.where[:, :, None] * width + torch.arange(width)).flatten(1)
                own = replace(reading, channels=member.channels, columns=columns, consumer=number)
                found[group.name].append(own)
    return {name: tuple(parts) for name, parts in found.items()}


def _consumer(
    run: PairedRun, visit: Visit, layer: Layer, *, norms: dict[str, Layer], settings: Settings,
    generator: torch.Generator, known: dict[tuple[str, Form], _Moments], salient: Sequence[Tensor] | None,
) -> tuple[Reading, int] | None:  # fmt: skip
    """The reading of all channels together, and the number of columns for each input channel.

    The weight is multiplied by the gain of the norm after it.
    None where the geometry of the call is unknown, patches are wider than WIDEST, or inputs are not finite.

    known:   the moments of the input that was read last, by form: queries, keys and values have the same
    salient: the salience of the layer's output positions, if it is known
    """
    module, node, outputs = run.original.module, visit.node, visit.outputs
    owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    weight = at(module, layer.params["weight"])
    form = form_of(node, layer, owner, weight)
    if form is None:
        return None
    rows = _plain(matrices_of(weight, form))
    blocks, width = form.groups, rows.size(2)
    if blocks * width > WIDEST:
        return None
    source = input_of(node, layer.op).name
    if (source, form) not in known:
        for other in [key for key in known if key[0] != source]:
            del known[other]
        shapes = shaped(outputs)
        count, real = enough(settings.rows, blocks * width, settings.memory), run.real(node.name, shapes, form)
        index_of = sample(shapes, form, count, generator, settings.reduce, real, salient)
        parts = [patches(x, form, index) for x, index in zip(run.original.values[source], index_of, strict=True)]
        mean, second = second_moments(parts, settings.reduce)
        independent = independent_rows(parts, mean, second, settings.reduce)
        gram = _diagonal(second)
        finite = bool(torch.isfinite(gram).all())
        gram = beside(weight, (gram.float() if len(gram) >= WIDE else gram).cpu())
        known[source, form] = _Moments(gram, mean.flatten().cpu(), independent, finite)
    moments = known[source, form]
    if not moments.finite:
        return None
    whole = _diagonal(rows)
    norm = epilogue_of(module, node, norms, set()).norm
    if norm is not None:
        whole = whole * line(module, norm, *run.statistics(norm, outputs))[0].to(whole)[:, None]
    assert layer.reads is not None
    each = blocks * width // layer.reads.numel()
    reading = Reading(
        gram=moments.gram,
        weight=beside(weight, whole.cpu()),
        channels=torch.arange(0),
        columns=torch.zeros(0, each, dtype=torch.int64),
        mean=moments.mean,
        independent=moments.independent,
    )
    return reading, each


def _of_experts(
    run: PairedRun, visit: Visit, layer: Layer, member: Member, number: int, settings: Settings
) -> Iterator[Reading]:
    """How each expert reads its channels, on the rows that are sent to it; none of an expert that has no row.

    number: of the consumer in its group
    """
    taken, real = routed_operands(visit.node), real_rows(run, visit.node)
    if taken is None or real is None:
        return
    inputs, ends = (run.original.values[operand.name] for operand in taken)
    weight = at(run.original.module, layer.params["weight"])
    width = weight.size(1 if layer.transposed else 2)
    for expert in range(len(weight) if width <= WIDEST else 0):
        here = member.where[:, 0] // width == expert
        index = [i if r is None else i[r[i]] for i, r in zip(expert_rows(ends, expert), real, strict=True)]
        parts = [x[i[: settings.rows]][:, None] for x, i in zip(inputs, index, strict=True)]
        count = torch.tensor(float(sum(map(len, parts))), dtype=torch.float64, device=weight.device)
        if not float(settings.reduce(count)) or not bool(here.any()):  # of all processes
            continue
        mean, second = second_moments(parts, settings.reduce)
        matrix = weight[expert].T if layer.transposed else weight[expert]
        yield Reading(
            gram=beside(weight, second[0].cpu()),
            weight=beside(weight, _plain(matrix).cpu()),
            channels=member.channels[here],
            columns=member.where[here] % width,
            mean=mean.flatten().cpu(),
            consumer=number,
            independent=independent_rows(parts, mean, second, settings.reduce),
        )


def _plain(weight: Tensor) -> Tensor:
    """A weight in float32, or in float64 if it is: where possible the memory of the model's own."""
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()


def _diagonal(blocks: Tensor) -> Tensor:
    """Blocks (g, a, b) as one matrix (g a, g b) that has them on its diagonal; a view of a single block."""
    g, a, b = blocks.shape
    if g == 1:
        return blocks[0]
    whole = blocks.new_zeros(g, a, g, b)
    whole[torch.arange(g), :, torch.arange(g)] = blocks
    return whole.view(g * a, g * b)
