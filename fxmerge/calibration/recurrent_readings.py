"""How the matrices of recurrent layers read channels: the inputs of each layer, and its own hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxmerge.calibration.paired_run import PairedRun, Settings, Visit
from fxmerge.calibration.patches import enough
from fxmerge.calibration.recurrent_states import network_of, states_at
from fxmerge.ir.groups import Group, Member
from fxmerge.methods.evidence import Reading
from fxmerge.methods.generalisation import independent_rows
from fxmerge.methods.least_squares import second_moments
from fxmerge.weights.by_path import at
from fxmerge.weights.stored_tensor import beside


def recurrent_readings(
    run: PairedRun, visit: Visit, members: Sequence[tuple[Group, int, Member]], settings: Settings
) -> Iterator[tuple[str, Reading]]:
    """How the matrices of a recurrent layer read these groups, by group; none where their states are not known.

    members: the consumers at this node, with their group and their number in it
    """
    stream, node = run.original, visit.node
    network, generator = network_of(stream.module, node), torch.Generator().manual_seed(settings.seed)
    parts: dict[str, list[Tensor]] = {member.layer.params["weight"]: [] for _, _, member in members}
    for number in range(len(stream.batches)):
        read = {}
        for place, states in states_at(stream, node, number).items():
            for kind, source in (("weight_ih", states.inputs), ("weight_hh", states.before)):
                name = f"{kind}{place}"
                read[f"{node.target}.{name}" if network is None else network.paths[name]] = source.flatten(0, 1)
        if not read.keys() >= parts.keys():
            return
        for path, rows in parts.items():
            rows.append(_some(read[path], len(stream.batches), settings, generator))
    for group, consumer, member in members:
        weight = at(stream.module, member.layer.params["weight"])
        rows = [part[:, None] for part in parts[member.layer.params["weight"]]]
        mean, second = second_moments(rows, settings.reduce)
        if not bool(second.isfinite().all()):
            continue
        reading = Reading(
            gram=beside(weight, second[0].cpu()),
            weight=beside(weight, weight.detach().cpu()),
            channels=member.channels,
            columns=member.where,
            mean=mean[0].cpu(),
            consumer=consumer,
            independent=independent_rows(rows, mean, second, settings.reduce),
        )
        yield group.name, reading


def _some(rows: Tensor, batches: int, settings: Settings, generator: torch.Generator) -> Tensor:
    """The share of a batch in the rows (n, p) that the moments are taken of."""
    share = -(-enough(settings.rows, rows.size(1), settings.memory) // batches)
    index = torch.randperm(len(rows), generator=generator)[:share].sort().values
    return rows[index.to(rows.device)]
