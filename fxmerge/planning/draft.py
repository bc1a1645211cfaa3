"""A draft: the merged graph of a choice of channels, with the kept ones carrying the dropped ones, before refit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxmerge.analysis.grouping import Chosen
from fxmerge.calibration.batches import Batches
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Merge, Refusal, survivors
from fxmerge.ir.provenance import Provenance
from fxmerge.methods.decomposition import DownUp
from fxmerge.methods.evidence import Reading
from fxmerge.options import Options
from fxmerge.plan import GroupPlan
from fxmerge.planning.by_expert import by_expert
from fxmerge.planning.components import components_of, merge_of
from fxmerge.planning.decompose import decompose
from fxmerge.planning.statistics import state
from fxmerge.progress import Stage
from fxmerge.rewrite.rewriter import Rewriter
from fxmerge.rewrite.rotate import rotated
from fxmerge.rules.resize import Call


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The decisions of a merge that are made before anything is rewritten.

    chosen:    the groups that narrow, with the channels that they keep
    turned:    the names of those that are rotated first, so that these channels are principal components
    edits:     {node: its call with new literal sizes}, for sizes that follow the widths of groups
    refusals:  the channels that are not merged, with reasons
    batches:   the data that refit runs on; empty if there is no refit
    notes:     requests that were not, or not fully, carried out
    """

    options: Options
    chosen: Chosen
    edits: Mapping[str, Call]
    refusals: tuple[Refusal, ...]
    batches: Batches = field(default_factory=list)
    notes: tuple[str, ...] = ()
    turned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Draft:
    """A merged graph, what was decided for each of its groups, and (label_count,) which labels are alive in it.

    original: the graph module that it is a part of: the captured one, with groups rotated
    rotated:  the nodes of BatchNorms of rotated groups
    """

    graph: fx.GraphModule
    plans: tuple[GroupPlan, ...]
    alive: Tensor
    original: fx.GraphModule
    rotated: frozenset[str] = frozenset()


def drafted(
    choice: Choice,
    captured: Capture,
    facts: Provenance,
    grouping: Grouping,
    *,
    tensors: Mapping[str, Tensor],
    readings: Mapping[str, tuple[Reading, ...]],
    stage: Stage,
) -> Draft:
    """The draft of a choice.

    tensors:  the model's parameters and buffers by path
    readings: {group: its consumers' second moments on refit's data}, where there is data
    """
    options, plans = choice.options.by_channels, []
    turning: dict[str, Tensor] = {}
    regressed: dict[str, tuple[GroupPlan, Merge]] = {}
    for group, kept in choice.chosen:
        if group.name in choice.turned:
            stage(f"components {group.name}")
            own, reads = components_of(group, captured, tensors, options, readings.get(group.name, ()))
            turning[group.name] = own.rotation
            counts = tuple(torch.bincount(group.cells[kept], minlength=int(group.cells.max()) + 1).tolist())
            plan = GroupPlan(group.name, group.channels, tuple(kept.tolist()), components=own.share(counts))
            regression = merge_of(group, kept, reads, own.rotation)
            regressed[group.name] = plan, Merge(group, kept) if options.decomposition == "prune" else regression
    turned = rotated(captured, [(g, turning[g.name]) for g, _ in choice.chosen if g.name in turning])
    tensors = tensors if turned is captured else state(turned.module)

    def decomposed(group: Group, kept: Tensor, seen: Sequence[Reading]) -> tuple[DownUp | None, Merge]:
        return decompose(group, kept, turned, tensors, options, seen)

    rewriter = Rewriter(turned.module, facts)
    for group, kept in choice.chosen:  # one at a time, as the decompositions of wide groups take much memory
        stage(f"decomposition {group.name}")
        if group.name in regressed:
            plan, merge = regressed[group.name]
            rewriter.absorb(merge)
        else:
            plan = by_expert(group, kept, readings.get(group.name, ()), decomposed, rewriter.absorb)
        plans.append(plan)
    stage("rewrite")
    alive = survivors(grouping, choice.chosen)
    moved = [m for g, _ in choice.chosen if g.name in turning for own in g.factors.producers for m in own]
    norms = frozenset(m.layer.node for m in moved if m.layer.has_running_statistics)
    return Draft(rewriter.finish(alive, choice.edits), tuple(plans), alive, turned.module, norms)
