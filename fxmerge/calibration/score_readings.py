"""What scores lose without some of the channels of queries and keys, by the second moments of what each contributes.

The score of a query q_i and a key k_j is a sum over channels c of q_ic k_jc. Over all pairs (i, j) of a sample,

    mean (q_ic k_jc) (q_id k_jd)  =  (mean_i q_ic q_id) (mean_j k_jc k_jd)

so the second moments of the contributions are the elementwise product of two Gram matrices, and the scores lose u' H u
without the channels u. A softmax over keys does not see a constant that is added to all scores of a query, so keys are
taken about their mean in the sample. Heads add up, and so do the two channels of a rotary pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmerge.calibration.paired_run import PairedRun
from fxmerge.ir.groups import Group, Grouping
from fxmerge.ir.labels import FIXED, thin
from fxmerge.ir.provenance import Contraction, Provenance
from fxmerge.ir.scores import is_attention, next_contractions, score_operands, summed_channels
from fxmerge.methods.evidence import Reading


@dataclass(frozen=True)
class Scores:
    """The scores in which a group's channels are summed.

    queries, keys:  their nodes
    at:             (places..., width) the group's channel along the summed axes, for each of the places that labels
                    vary along (heads); n, the number of channels, for what is not in the group, or is read by a layer
    centred:        whether the scores go through a softmax only, so that keys count about their mean
    """

    group: Group
    record: Contraction
    queries: fx.Node
    keys: fx.Node
    at: Tensor
    centred: bool


def scores_of(
    graph: fx.Graph, facts: Provenance, grouping: Grouping, groups: Sequence[Group]
) -> dict[str, list[Scores]]:
    """Node -> the scores that it computes with channels of these groups that no layer reads."""
    nodes, found = {n.name: n for n in graph.nodes}, dict[str, list[Scores]]()
    contractions = {record.node for record in facts.contractions}
    for record in facts.contractions:
        node = nodes[record.node]
        pair = score_operands(record, node, facts)
        if pair is None:
            continue
        labels = _of_places(record)
        _, passed = next_contractions(node, contractions)
        centred = is_attention(node, facts) or any(facts.rules.get(n.name) == "softmax" for n in passed)
        for part in grouping.parts:
            for group in part.groups:
                if all(group is not g for g in groups):
                    continue
                n = group.channels
                unread = torch.ones(n, dtype=torch.bool)
                for consumer in group.consumers:
                    unread[consumer.channels] = False
                of_atom = torch.full((int(part.atom.max()) + 1,), n)
                of_atom[group.atoms] = torch.where(unread, torch.arange(n), n)
                at = of_atom[part.atom[labels]]
                if bool((at < n).any()):
                    found.setdefault(record.node, []).append(Scores(group, record, *pair, at, centred))
    return found


def _of_places(record: Contraction) -> Tensor:
    """The labels that are summed, (places..., width), with the axes of places in the order of the first operand's."""
    kept, summed = _shared(record)
    both = zip((record.left, record.right), record.letters, strict=True)
    small = [_laid_out(thin(t), letters, kept, summed)[..., 0, :] for t, letters in both]
    left, right = torch.broadcast_tensors(*small)  # type: ignore[no-untyped-call]
    found: Tensor = torch.where(left == FIXED, right, left)
    return found


def _shared(record: Contraction) -> tuple[list[str], list[str]]:
    """The letters of the axes that both operands have: (those of places, such as heads; those that are summed)."""
    summed, (own, others) = summed_channels(record), record.letters
    return [c for c in own if c in others and c not in summed], [c for c in own if c in summed]


def _laid_out(x: Tensor, letters: str, kept: Sequence[str], summed: Sequence[str]) -> Tensor:
    """A tensor as (kept..., other places, summed): one axis for all of the others, and one for all that are summed."""
    others = [c for c in letters if c not in kept and c not in summed]
    moved = x.permute([letters.index(c) for c in (*kept, *others, *summed)])
    shape = moved.shape[: len(kept)]
    return moved.reshape(*shape, moved.shape[len(kept) : len(kept) + len(others)].numel(), -1)


def score_reading(run: PairedRun, scores: Scores) -> Reading | None:
    """The second moments of what a group's channels contribute to scores; None if they are not known, or not finite.

    Its matrix has one more row, for what is not in the group.
    """
    n, (own, others) = scores.group.channels, scores.record.letters
    kept, summed = _shared(scores.record)
    total = torch.zeros((n + 1) ** 2, dtype=torch.float64)
    values = (run.original.values[node.name] for node in (scores.queries, scores.keys))
    for number, (q, k) in enumerate(zip(*values, strict=True)):
        if any(not isinstance(x, Tensor) or x.dim() != len(axes) for x, axes in ((q, own), (k, others))):
            return None  # the user's own code, which does not run again, made it
        q, k = _laid_out(q, own, kept, summed), _laid_out(k, others, kept, summed)
        of_queries = _gram(q, _real(run, scores.queries, number, q), False)
        of_keys = _gram(k, _real(run, scores.keys, number, k), scores.centred)
        for axis in range(len(kept)):  # a head of the keys may serve several queries, one after the other
            several = of_queries.size(axis) // of_keys.size(axis)
            of_keys = of_keys.repeat_interleave(several, axis) if several > 1 else of_keys
        product, at = of_queries * of_keys, scores.at
        for axis in range(len(kept)):
            product = product.sum(axis, keepdim=True) if at.size(axis) == 1 else product
            at = _tiled(at, axis, product.size(axis))
        if at.shape != product.shape[:-1]:
            return None
        total.index_add_(0, (at[..., :, None] * (n + 1) + at[..., None, :]).flatten(), product.cpu().flatten())
    total = run.reduce(total)
    if not bool(torch.isfinite(total).all()):
        return None
    channels = torch.unique(scores.at[scores.at < n])
    weight, gram = torch.ones(1, n + 1, dtype=torch.float64), total.view(n + 1, n + 1)
    return Reading(gram, weight, channels, channels[:, None], solved=False)


def _gram(x: Tensor, real: Tensor | None, centred: bool) -> Tensor:
    """The sums over rows of the products of columns, (..., rows, width) -> (..., width, width), float64."""
    x = x if x.dtype == torch.float64 else x.float()
    weight = x.new_ones(x.size(-2), 1) if real is None else real.to(x)
    if centred:
        x = x - (x * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp(min=1)
    x = x * weight
    return (x.mT @ x).double()


def _real(run: PairedRun, node: fx.Node, number: int, x: Tensor) -> Tensor | None:
    """Which rows of (samples, ..., rows, width) are not padding, (samples, 1..., rows, 1) bool; None: all of them."""
    if run.padding is None or x.dim() < 3:
        return None
    real = run.padding.real(node.name, run.original.batches[number], (x.size(0), x.size(-2)))
    return None if real is None else real.view(x.size(0), *[1] * (x.dim() - 3), x.size(-2), 1)


def _tiled(at: Tensor, axis: int, size: int) -> Tensor:
    """`at` for a batch of another size, where an axis holds samples and heads: it is repeated for each sample."""
    own = at.size(axis)
    if own in (1, size):
        return at
    for period in (p for p in range(1, own + 1) if own % p == 0 and size % p == 0):
        first = at.narrow(axis, 0, period)
        repeats = [1] * at.dim()
        repeats[axis] = own // period
        if torch.equal(first.repeat(repeats), at):
            repeats[axis] = size // period
            return first.repeat(repeats)
    return at
