"""What the model's outputs lose if one group alone narrows, measured on a few samples.

Each consumer reads what the kept channels tell of the dropped ones, and only what follows the consumers runs again. The
losses of groups that narrow together add up, nearly, while they are small. An error curve tells how the loss of its
group grows with the channels that it drops, in the group's own terms; it is scaled to the measured loss. Far beyond the
width at which that was measured, a group may lose more than its curve tells: in its consumers' terms, what is left to
lose becomes less and less. There, the loss is at least the measured one times the square of how many more channels are
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge.calibration.batches import Batches
from fxmerge.calibration.division import judging
from fxmerge.calibration.paired_run import Settings, axis_of_outputs
from fxmerge.calibration.patches import input_of
from fxmerge.calibration.trial_runs import first_samples
from fxmerge.calibration.whole_run import Change, WholeRun, affordable
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Member, Merge
from fxmerge.methods.allocation import Counts, Floats
from fxmerge.methods.evidence import Reading
from fxmerge.options import Options
from fxmerge.planning.components import Read, components_of, regressed
from fxmerge.planning.counts import nearest
from fxmerge.planning.decompose import decompose
from fxmerge.planning.room import Room
from fxmerge.planning.selecting import Selected
from fxmerge.progress import Stage
from fxmerge.weights.by_path import at

BUDGET = 5e12  # FLOPs of all runs together, at most; at least one sample
BEYOND = 2.0  # the power with which a loss grows at least beyond the measured width
NONE = 1e-9  # a loss that is rounding


@dataclass(frozen=True)
class Map:
    """x ~ matrix @ x + shift for the channels of one member: (copies, m, m), (copies, m)."""

    matrix: Tensor
    shift: Tensor


@torch.no_grad()
def losses_alone(
    room: Room,
    select: Callable[[Counts], Selected],
    batches: Batches,
    settings: Settings,
    *,
    readings: Mapping[str, tuple[Reading, ...]],
    tensors: Mapping[str, Tensor],
    stage: Stage,
) -> dict[str, tuple[int, float]]:
    """{group: the rung at about the share that the budget leaves, and the relative square error of the outputs there},
    for the groups that may narrow and for which it can be measured.

    select: the channels that the groups keep, for numbers of them
    """
    captured, options, ((_, share),) = room.captured, room.options, room.options.budget.items()
    rungs = {g.name: nearest(room.ladders[g.name], share) for g in room.free if _is_plain(g)}
    if captured.recorded is not None or not rungs or not batches:
        return {}
    full = {g.name: tuple(map(int, room.ladders[g.name][rungs.get(g.name, 0)])) for g in room.free}
    chosen = select(full)
    found = {}
    held = judging(captured, batches, settings)[0]
    some = first_samples(captured, held, affordable(captured, len(rungs), room.flops, BUDGET))
    with evaluating(captured.module):
        stage("single groups")
        whole = WholeRun(captured, room.facts, some, settings)
        whole.run()
        for number, (group, kept) in enumerate(chosen.chosen):
            if group.name in rungs:
                stage(f"alone {group.name}", number / len(rungs))
                turned = group.name in chosen.turned
                maps = _maps(group, kept, captured, tensors, options, readings.get(group.name, ()), turned)
                found[group.name] = rungs[group.name], whole.loss(_changes(whole, group, maps))
    return {name: (rung, loss) for name, (rung, loss) in found.items() if np.isfinite(loss)}


def calibrated(errors: Floats, ladder: Floats, rung: int, loss: float, typical: float) -> Floats:
    """The errors of a group at its rungs, (R,), so that it loses `loss` at the rung where that was measured.

    errors:   those of its curve
    ladder:   channels kept in each cell at each rung, (R, cells)
    typical:  the factor for a group whose curve or measured loss is zero there
    """
    factor = loss / errors[rung] if errors[rung] > NONE and loss > NONE else typical
    found = errors * factor
    dropped = 1 - ladder.sum(1) / ladder[0].sum()
    law = np.where(dropped > dropped[rung], found[rung] * (dropped / dropped[rung]) ** BEYOND, 0.0)
    return np.maximum.accumulate(np.maximum(found, law))


def _is_plain(group: Group) -> bool:
    """Whether what its members read or write is an activation with an axis of channels."""
    members = group.consumers or group.producers
    return bool(members) and not any(m.layer.is_stacked or m.layer.operation.is_recurrent for m in members)


def _maps(
    group: Group, kept: Tensor, captured: Capture, tensors: Mapping[str, Tensor], options: Options,
    readings: Sequence[Reading], turned: bool,
) -> list[Map]:  # fmt: skip
    """What each consumer reads in place of its input; what each producer writes, if no layer reads the channels."""
    members = group.consumers or group.producers
    if turned:
        own, reads = components_of(group, captured, tensors, options, readings)
        return [_turned(group, number, kept, own.rotation, reads) for number in range(len(members))]
    merge = decompose(group, kept, captured, tensors, options.by_channels, readings)[1]
    found = []
    for number, member in enumerate(members):
        copies = member.where.size(1)
        up, shift = torch.eye(group.channels, dtype=torch.float64)[:, kept], torch.zeros(group.channels, 1)
        if group.consumers and merge.consumers:
            up, shift = _of_copies(merge, number)
        up, shift = up.expand(copies, -1, -1), shift.double().T.expand(copies, -1)
        matrix = torch.zeros(copies, group.channels, group.channels, dtype=torch.float64)
        matrix[:, :, kept] = up
        own_channels = member.channels
        found.append(Map(matrix[:, own_channels][:, :, own_channels], shift[:, own_channels]))
    return found


def _turned(group: Group, number: int, kept: Tensor, rotation: Tensor, reads: Sequence[Read]) -> Map:
    """What one consumer reads in place of its input, where components are kept."""
    read, channels, matrices, shifts = reads[number], group.consumers[number].channels, [], []
    parts = regressed(group, [number], kept, reads, rotation)
    for strand, part in zip(group.strands.consumers[number], parts, strict=True):
        basis = rotation[strand]
        matrix = read.gain[:, None] * (basis.T @ part.up @ basis[kept]) * read.inverse
        matrices.append(matrix[channels][:, channels])
        shifts.append((read.gain * (basis.T @ part.shift))[channels])
    return Map(torch.stack(matrices), torch.stack(shifts))


def _of_copies(merge: Merge, number: int) -> tuple[Tensor, Tensor]:
    """up (copies or 1, n, k) and shift (n, copies or 1) of a consumer."""
    part = merge.consumers[number]
    return part.up if part.up.dim() == 3 else part.up[None], part.shift if part.shift.dim() == 2 else part.shift[
        :, None
    ]


def _changes(whole: WholeRun, group: Group, maps: Sequence[Map]) -> dict[str, Change]:
    nodes = {node.name: node for node in whole.nodes}

    def reading(member: Member, own: Map) -> Change:
        node = nodes[member.layer.node]
        source = input_of(node, member.layer.op).name

        def change(given: Mapping[str, Any], number: int) -> Any:
            inputs = _mapped(whole.value(source, given, number), whole, member, own)
            return whole.again(node, {**given, source: inputs}, number)

        return change

    def writing(member: Member, own: Map) -> Change:
        node = nodes[member.layer.node]

        def change(given: Mapping[str, Any], number: int) -> Any:
            return _mapped(whole.again(node, given, number), whole, member, own)

        return change

    how = reading if group.consumers else writing
    members = group.consumers or group.producers
    return {member.layer.node: how(member, own) for member, own in zip(members, maps, strict=True)}


def _mapped(value: Tensor, whole: WholeRun, member: Member, own: Map) -> Tensor:
    """The value of an activation with the channels of a member replaced."""
    axis = axis_of_outputs(value, at(whole.module, member.layer.params["weight"]))
    last = value.movedim(axis, -1).clone()
    for copy, where in enumerate(member.where.T):
        where = where.to(value.device)
        part = last[..., where] @ own.matrix[copy].T.to(value) + own.shift[copy].to(value)
        last[..., where] = part
    return last.movedim(-1, axis)
