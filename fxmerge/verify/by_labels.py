"""Oracles that change the channels of a group in all of its members: permutation, over-coupling, duplicates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.graph.compare import difference
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Member
from fxmerge.ir.provenance import ParamLabels, Provenance
from fxmerge.rewrite.slicing import gather, places
from fxmerge.verify.at_zero import AtZero
from fxmerge.verify.in_double import in_float64, outputs_of
from fxmerge.verify.silencing import set_to_zero
from fxmerge.weights.by_path import at
from fxmerge.weights.copy import sharing_copy
from fxmerge.weights.layout import from_out_first, out_first

NO_EPS = 1e-11  # an eps up to here changes nothing that the oracle could see


def permutation(captured: Capture, facts: Provenance, grouping: Grouping, seed: int = 0) -> dict[str, float]:
    """The relative change of the float64 output when a group is permuted, by group; about 1e-15 if all is correct."""
    module, args, kwargs = in_float64(captured)
    before = outputs_of(captured, module, args, kwargs)
    found = {}
    for part, group in ((p, g) for p in grouping.parts for g in p.groups):
        permuted = permute(module, facts, part, group, seed)
        found[group.name] = difference(before, outputs_of(captured, permuted, args, kwargs))
    return found


def overcoupling(
    captured: Capture, facts: Provenance, grouping: Grouping, seed: int = 0
) -> dict[tuple[str, str], float]:
    """The relative change of the output when one member is not permuted, by (group, member).

    A change of 0 means that the member is superfluous. Groups with one channel per cell are left out. The model should
    have random BatchNorm parameters, since a member with equal values for all channels cannot be detected.
    """
    module, args, kwargs = in_float64(captured)
    before = outputs_of(captured, module, args, kwargs)
    found = {}
    for part, group in ((p, g) for p in grouping.parts for g in p.groups):
        if group.channels == int(group.cells.max()) + 1:
            continue
        for member in (*group.producers, *group.per_channel_params, *group.consumers):
            reads = member.role == "read"
            left_out = {
                (path, int(reads != member.layer.transposed) + member.layer.is_stacked if slot == "weight" else 0)
                for slot, path in member.layer.params.items()
                if slot == "weight" or not reads
            }
            permuted = permute(module, facts, part, group, seed, left_out=left_out)
            name = f"{member.layer.module} ({member.role})"
            found[group.name, name] = difference(before, outputs_of(captured, permuted, args, kwargs))
    return found


def permute(
    module: fx.GraphModule, facts: Provenance, grouping: Grouping, group: Group, seed: int = 0, *,
    left_out: set[tuple[str, int]] | frozenset[tuple[str, int]] = frozenset(),
) -> fx.GraphModule:  # fmt: skip
    """A copy with the channels of one group permuted at random within their cells.

    left_out: (parameter path, axis) pairs that are not permuted
    """
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(int(grouping.atom.max()) + 1)  # atom -> the atom whose place it takes
    for cell in range(int(group.cells.max()) + 1):
        inside = group.atoms[group.cells == cell]
        order = torch.randperm(len(inside), generator=generator)
        if len(inside) > 1 and bool((order == torch.arange(len(inside))).all()):
            order = order.roll(1)
        source[inside] = inside[order]
    moved = (source != torch.arange(len(source)))[grouping.atom]
    permuted, weights = sharing_copy(module)
    for labels in facts.params.values():
        if not any(bool(moved[t].any()) for t in places(labels)):
            continue
        axes = {a: t if (labels.path, a) not in left_out else torch.zeros_like(t) for a, t in labels.axes.items()}
        if labels.elements is not None and (labels.path, 0) in left_out:
            continue
        kept = ParamLabels(labels.path, axes, labels.elements, labels.groups)
        gather(weights, kept, lambda flat: _sources(grouping.atom[flat], source))
    return permuted


def _sources(atoms: Tensor, source: Tensor) -> Tensor:
    """The place that each place takes its entry from: copy q of an atom takes copy q of its source. (m,) -> (m,)"""
    order = torch.argsort(atoms, stable=True)
    inside = atoms[order]
    first = torch.searchsorted(inside, torch.arange(len(source)))  # the position in `order` of each atom's first copy
    copy_number = torch.empty_like(atoms)
    copy_number[order] = torch.arange(len(atoms)) - first[inside]
    taken: Tensor = order[first[source[atoms]] + copy_number]
    return taken


def duplicate(
    captured: Capture, facts: Provenance, grouping: Grouping, share: float = 0.3, seed: int = 0
) -> tuple[fx.GraphModule, Any, dict[str, Tensor]]:
    """A float64 copy of the model in which some channels of each group are scaled copies of others, in all members.

    Merging this model with `mostsim` must return the same function if the copies are dropped. At the producers, a copy
    is smaller than every other channel, so that selection by norm drops it. In groups with scale_blocks, mixers or
    norms on batch statistics, a copy equals its original, so that the kept channels must be given. Channels that no
    weight reads (queries and keys) get zeros instead, since nothing could absorb a copy.

    Returns the model, its example inputs, and the channels to keep, by group.
    """
    module, args, kwargs = in_float64(captured)
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, Tensor] = {}
    for group in grouping.groups:
        if not group.partners or not group.consumers:
            continue
        pairs: list[tuple[int, int]] = []
        counts = [int(count * share) for count in torch.bincount(group.cells).tolist()]
        unread = torch.ones(group.channels, dtype=torch.bool)
        for consumer in group.consumers:
            unread[consumer.channels] = False
        if bool(unread.any()) and AtZero(captured, facts, grouping).reason(group):
            for cell in torch.unique(group.cells[unread]).tolist():
                counts[cell] = 0
        if any(len({sum(counts[cell] for cell in row) for row in block}) > 1 for block in group.blocks):
            continue  # its blocks would lose different numbers of channels
        for cell in range(int(group.cells.max()) + 1):
            index = (group.cells == cell).nonzero().flatten()
            index = index[torch.randperm(len(index), generator=generator)]
            count = counts[cell]
            pairs += list(zip(index[:count].tolist(), index[count:].tolist(), strict=False))
        if pairs:
            copies = [pair for pair in pairs if not unread[pair[0]]]
            if copies:
                _overwrite(module, group, torch.tensor(copies).T, generator)
            zeros = torch.tensor([i for i, _ in pairs if unread[i]], dtype=torch.int64)
            stays = torch.ones(group.channels, dtype=torch.bool).index_fill_(0, zeros, False)
            set_to_zero(partial(at, module), group, stays.nonzero().flatten())
            gone = {i for i, _ in pairs}
            kept[group.name] = torch.tensor([i for i in range(group.channels) if i not in gone])
    return module, args or kwargs, kept


def _overwrite(module: fx.GraphModule, group: Group, pairs: Tensor, generator: torch.Generator) -> None:
    """Makes channel i = pairs[0] a copy of channel j = pairs[1] in every member of the group."""
    norms = torch.stack([_norms(module, w, group.channels) for w in group.producers])  # (producers, n)
    smallest = norms.amin(1, keepdim=True)  # a copy must be smaller than any other channel
    below = (smallest / norms.where(norms.isfinite(), 0)).amin(0)[pairs[1]]
    params = group.params_at
    norms_alone = [m.layer for m in group.per_channel_params if m.layer.operation.is_channel_norm]
    # a norm without a weight gives a copy the scale of its original, whatever the scale that comes in
    fixed = any("weight" not in layer.params for layer in norms_alone)
    # one with statistics of its input adds eps to the variance of a copy and of its original alike
    equal = bool(group.scale_blocks) or any(n.eps > NO_EPS and not n.has_running_statistics for n in norms_alone)

    def factor() -> Tensor:
        if equal:
            return torch.ones(pairs.size(1), dtype=torch.float64)
        return below * (0.3 + 0.4 * torch.rand(pairs.size(1), generator=generator, dtype=torch.float64))

    common = torch.ones(pairs.size(1), dtype=torch.float64) if fixed else factor()
    ways: dict[str, set[tuple[str, ...]]] = {}  # a weight that is called again -> the steps before each call
    for consumer in group.consumers:
        ways.setdefault(consumer.layer.params["weight"], set()).add(tuple(s for s in consumer.steps if s in params))
    again = any(len(steps) > 1 for steps in ways.values())  # then a copy needs the same scale behind all steps
    written: dict[tuple[str, bytes], Tensor] = {}  # a producer's weight and places -> the scale of its copies
    after: dict[tuple[str, ...], Tensor] = {}  # the parameters of a node -> the scale of a copy after it

    def through(step: str, before: Tensor, target: Tensor) -> Tensor:
        """The scale of a copy after a step; a parameter that serves several nodes is written once."""
        members = params[step]
        held = tuple(path for m in members for path in m.layer.params.values()) or (step,)
        if held not in after:
            scale = before
            for member in members:
                here = member.local(pairs[0])[0]
                scale = torch.where(here, _carry(module, member, pairs, scale, target), scale)
            after[held] = scale
        return after[held]

    with torch.no_grad():
        for producer in group.producers:
            steps = [s for s in producer.steps if s in params]
            able = [s for s in steps if any(m.layer.operation.rescales for m in params[s])]
            if producer.place not in written:
                written[producer.place] = factor() if able else common
                for slot in ("weight", "bias"):
                    _copy(module, producer, slot, pairs, written[producer.place])
            scale = written[producer.place]
            for step in steps:
                scale = through(step, scale, factor() if step in able[:-1] else common)
        for consumer in group.consumers:
            scale = common
            for step in (s for s in consumer.steps if s in params):
                scale = through(step, scale, common if again else factor())
        for node in params:
            through(node, torch.ones_like(common), torch.ones_like(common))


def _norms(module: nn.Module, producer: Member, n: int) -> Tensor:
    """The norm of a producer's row for each channel, (n,); infinite for channels that it does not write."""
    weight = at(module, producer.layer.params["weight"])
    rows = out_first(weight, producer.layer).flatten(1)
    own = torch.linalg.vector_norm(rows[producer.where].flatten(1), dim=1)
    return torch.full((n,), torch.inf, dtype=own.dtype).index_copy_(0, producer.channels, own)


def _copy(module: nn.Module, member: Member, slot: str, pairs: Tensor, scale: Tensor) -> None:
    """Overwrites entries i of one parameter of a member with `scale` times entries j."""
    path = member.layer.params.get(slot)
    if path is not None:
        value = at(module, path)
        flat = value.view(-1) if member.layer.operation.is_elementwise else value
        by_rows = slot == "weight" and member.role == "write"
        if by_rows:
            flat = out_first(value, member.layer)
        here, local = member.local(pairs[0])
        to, source, scale = member.where[local], member.where[member.local(pairs[1])[1]], scale[here]
        flat[to] = flat[source] * scale.reshape(-1, *[1] * (flat[source].dim() - 1)).to(value)
        if by_rows:  # which may be a copy
            value.copy_(from_out_first(flat, value, member.layer))


def _carry(module: nn.Module, per_channel_param: Member, pairs: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Makes a per-channel parameter turn a copy of scale `before` into one of scale `after`.

    Returns the scale of the copy after it, which is `before` where the parameter cannot change a scale.
    """
    layer, op = per_channel_param.layer, per_channel_param.layer.operation
    if op.is_channel_norm:
        here, local = per_channel_param.local(pairs[0])
        i, j = per_channel_param.where[local], per_channel_param.where[per_channel_param.local(pairs[1])[1]]
        _copy(module, per_channel_param, "running_mean", pairs, before)
        if "running_var" in layer.params:
            var = at(module, layer.params["running_var"])
            var[i] = before[here].square()[:, None].to(var) * (var[j] + layer.eps) - layer.eps
        if "weight" not in layer.params:
            after = torch.ones_like(after)
        _copy(module, per_channel_param, "weight", pairs, after)
        _copy(module, per_channel_param, "bias", pairs, after)
    elif op.is_depthwise:
        _copy(module, per_channel_param, "weight", pairs, after / before)
        _copy(module, per_channel_param, "bias", pairs, after)
    elif op.is_scale:
        _copy(module, per_channel_param, "weight", pairs, before / after if op.inverted else after / before)
    elif op.is_offset:
        _copy(module, per_channel_param, "weight", pairs, before)
    else:
        for slot in layer.params:
            _copy(module, per_channel_param, slot, pairs, torch.ones_like(before))
    return after if op.rescales else before
