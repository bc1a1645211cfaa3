"""Checks that an analysis and a merge are correct: three oracles for tests and users, and a check after every merge.

permutation     permutes the channels of each group in all of its members; the output must not change. Detects missing
                ties and wrong indices.
overcoupling    leaves one member of a group out of that permutation; the output must change. Detects superfluous
                members.
duplicate       overwrites some channels with scaled copies of others, in all members; merging by `mostsim` must then
                return the same function with fewer channels. Detects wrong absorption.
compare         runs at the end of every merge: the merged model must run and return outputs of the original's shapes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.graph.compare import Verdict, difference, outputs
from fxmerge.graph.nested import tree
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Member
from fxmerge.ir.provenance import ParamLabels, Provenance
from fxmerge.rewrite.reassemble import assembled
from fxmerge.rewrite.slicing import gather, places
from fxmerge.weights.by_path import at
from fxmerge.weights.copy import sharing_copy
from fxmerge.weights.layout import from_out_first, out_first

_REMEDY = "please report this model; until then, exclude the layer with ignore="


def compare(captured: Capture, merged: nn.Module) -> Verdict:
    """Runs the merged model on the example inputs and compares its outputs with the original's.

    Raises FxMergeError where the merged model does not run, or where its outputs have other shapes.
    """
    before = list(captured.outputs)
    try:
        after = outputs(merged, captured.args, captured.kwargs)
    except Exception as error:
        raise FxMergeError(f"the merged model does not run ({error}); {_REMEDY}") from error
    if captured.recorded is not None and [t.shape[1:] for t in before] == [t.shape[1:] for t in after]:
        # the number of boxes that a detector returns depends on values: only outputs of equal length are compared
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.shape == a.shape]
        before, after = [b for b, _ in pairs], [a for _, a in pairs]
    if [t.shape for t in before] != [t.shape for t in after]:
        raise FxMergeError(f"the merged model's outputs have other shapes than the original's; {_REMEDY}")
    return Verdict(difference(before, after))


def in_float64(captured: Capture) -> tuple[fx.GraphModule, tuple[Any, ...], dict[str, Any]]:
    """A float64 copy of a captured graph module, and of its example (args, kwargs).

    Raises FxMergeError for a model on the meta device.
    """
    if captured.blank:
        raise FxMergeError("a model on the meta device has no values to verify; give a model with weights")

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    positional: tuple[Any, ...] = tree(double, captured.args)
    module = copy.deepcopy(captured.module).double()
    for node in module.graph.nodes:  # casts to float32 in the graph would lose the precision of float64

        def cast(leaf: Any) -> Any:
            return torch.float64 if leaf is torch.float32 else leaf

        node.args, node.kwargs = tree(cast, tuple(node.args)), tree(cast, dict(node.kwargs))
    module.recompile()
    return module, positional, tree(double, dict(captured.kwargs))


def whole(captured: Capture, module: fx.GraphModule) -> nn.Module:
    """The float64 model that users would get for a copy of the captured graph module."""
    return assembled(captured, module).double()


def permutation(captured: Capture, facts: Provenance, grouping: Grouping, seed: int = 0) -> dict[str, float]:
    """The relative change of the float64 output when a group is permuted, by group; about 1e-15 if all is correct."""
    module, args, kwargs = in_float64(captured)
    before = outputs(whole(captured, module), args, kwargs)
    found = {}
    for part, group in ((p, g) for p in grouping.parts for g in p.groups):
        permuted = permute(module, facts, part, group, seed)
        found[group.name] = difference(before, outputs(whole(captured, permuted), args, kwargs))
    return found


def overcoupling(
    captured: Capture, facts: Provenance, grouping: Grouping, seed: int = 0
) -> dict[tuple[str, str], float]:
    """The relative change of the output when one member is not permuted, by (group, member).

    A change of 0 means that the member is superfluous. Groups with one channel per cell are left out. The model should
    have random BatchNorm parameters, since a member with equal values for all channels cannot be detected.
    """
    module, args, kwargs = in_float64(captured)
    before = outputs(whole(captured, module), args, kwargs)
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
            found[group.name, name] = difference(before, outputs(whole(captured, permuted), args, kwargs))
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
    is smaller than every other channel, so that selection by norm drops it. In groups with scale_blocks or mixers, a
    copy equals its original, so that the kept channels must be given.

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
        if any(len({sum(counts[cell] for cell in row) for row in block}) > 1 for block in group.blocks):
            continue  # its blocks would lose different numbers of channels
        for cell in range(int(group.cells.max()) + 1):
            index = (group.cells == cell).nonzero().flatten()
            index = index[torch.randperm(len(index), generator=generator)]
            count = counts[cell]
            pairs += list(zip(index[:count].tolist(), index[count:].tolist(), strict=False))
        if pairs:
            _overwrite(module, group, torch.tensor(pairs).T, generator)
            gone = {i for i, _ in pairs}
            kept[group.name] = torch.tensor([i for i in range(group.channels) if i not in gone])
    return module, args or kwargs, kept


def _overwrite(module: fx.GraphModule, group: Group, pairs: Tensor, generator: torch.Generator) -> None:
    """Makes channel i = pairs[0] a copy of channel j = pairs[1] in every member of the group."""
    norms = torch.stack([_norms(module, w, group.channels) for w in group.producers])  # (producers, n)
    smallest = norms.amin(1, keepdim=True)  # a copy must be smaller than any other channel
    below = (smallest / norms.where(norms.isfinite(), 0)).amin(0)[pairs[1]]

    def factor() -> Tensor:
        if group.scale_blocks:
            return torch.ones(pairs.size(1), dtype=torch.float64)
        return below * (0.3 + 0.4 * torch.rand(pairs.size(1), generator=generator, dtype=torch.float64))

    per_channel_params = {m.layer.node: m for m in group.per_channel_params}
    common = factor()
    written: set[tuple[str, tuple[int, ...]]] = set()
    after: dict[str, Tensor] = {}  # node of a per-channel parameter -> the scale of a copy after it
    with torch.no_grad():
        for producer in group.producers:
            steps = [s for s in producer.steps if s in per_channel_params]
            able = [s for s in steps if per_channel_params[s].layer.operation.rescales]
            scale = factor() if able else common
            held = (producer.layer.params["weight"], tuple(producer.where.flatten().tolist()))
            if held not in written:
                written.add(held)
                for slot in ("weight", "bias"):
                    _copy(module, producer, slot, pairs, scale)
            for step in steps:
                target = factor() if step in able[:-1] else common
                if step not in after:
                    after[step] = _carry(module, per_channel_params[step], pairs, scale, target)
                scale = after[step]
        for consumer in group.consumers:
            scale = common
            for step in consumer.steps:
                if step in per_channel_params:
                    if step not in after:
                        after[step] = _carry(module, per_channel_params[step], pairs, scale, factor())
                    scale = after[step]
        for node, per_channel_param in per_channel_params.items():
            if node not in after:
                _carry(module, per_channel_param, pairs, torch.ones_like(common), torch.ones_like(common))


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
    if op.name == "batch_norm":
        here, local = per_channel_param.local(pairs[0])
        i, j = per_channel_param.where[local], per_channel_param.where[per_channel_param.local(pairs[1])[1]]
        _copy(module, per_channel_param, "running_mean", pairs, before)
        if "running_var" in layer.params:
            var = at(module, layer.params["running_var"])
            var[i] = before[here].square()[:, None].to(var) * (var[j] + layer.eps) - layer.eps
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
