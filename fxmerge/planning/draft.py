"""A draft: the merged graph of a choice of channels, with the kept ones carrying the dropped ones, before refit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
from fxmerge.planning.decompose import decompose
from fxmerge.rewrite.rewriter import Rewriter
from fxmerge.rules.resize import Call


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The decisions of a merge that are made before anything is rewritten.

    chosen:    the groups that narrow, with the channels that they keep
    edits:     {node: its call with new literal sizes}, for sizes that follow the widths of groups
    refusals:  the channels that are not merged, with reasons
    batches:   the data that refit runs on; empty if there is no refit
    notes:     requests that were not, or not fully, carried out
    """

    options: Options
    chosen: Chosen
    edits: Mapping[str, Call]
    refusals: tuple[Refusal, ...]
    batches: Batches
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A merged graph, what was decided for each of its groups, and (label_count,) which labels are alive in it."""

    graph: fx.GraphModule
    plans: tuple[GroupPlan, ...]
    alive: Tensor


def drafted(
    choice: Choice,
    captured: Capture,
    facts: Provenance,
    grouping: Grouping,
    *,
    tensors: Mapping[str, Tensor],
    readings: Mapping[str, tuple[Reading, ...]],
    stage: Callable[[str], None],
) -> Draft:
    """The draft of a choice.

    tensors:  the model's parameters and buffers by path
    readings: {group: its consumers' second moments on refit's data}, where there is data
    """

    def decomposed(group: Group, kept: Tensor, seen: Sequence[Reading]) -> tuple[DownUp | None, Merge]:
        return decompose(group, kept, captured, tensors, choice.options, seen)

    rewriter, plans = Rewriter(captured.module, facts), []
    for group, kept in choice.chosen:  # one at a time, as the decompositions of wide groups take much memory
        stage(f"decomposition {group.name}")
        plans.append(by_expert(group, kept, readings.get(group.name, ()), decomposed, rewriter.absorb))
    stage("rewrite")
    alive = survivors(grouping, choice.chosen)
    return Draft(rewriter.finish(alive, choice.edits), tuple(plans), alive)
