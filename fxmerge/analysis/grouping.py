"""Narrowing: which groups may be touched, and whether what is chosen of them can be cut out of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fxmerge.analysis.groups import aligned, group, joined
from fxmerge.analysis.literal_sizes import Failure, recompute
from fxmerge.analysis.members import survivors
from fxmerge.analysis.whole_blocks import whole, width
from fxmerge.errors import FxMergeError, source_line
from fxmerge.ir.records import Capture, Group, Grouping, Provenance, Refusal
from fxmerge.methods.selection import select
from fxmerge.options import Options
from fxmerge.plan import GroupPlan
from fxmerge.planning.counts import ignored, shaken
from fxmerge.planning.statistics import candidates
from fxmerge.rewrite.rewriter import Rewriter
from fxmerge.rules.resize import Call

Chosen = list[tuple[Group, Tensor]]  # groups that narrow, with the channels that they keep


def grouped(captured: Capture, facts: Provenance, heads: str) -> tuple[Provenance, Grouping]:
    """The groups, where blocks lose width, leave whole, or do both (`Options.heads`)."""
    if heads == "whole":
        return _unshuffled(captured, whole(facts))
    narrower, grouping = _unshuffled(captured, width(facts))
    if heads == "both":
        grouping = joined(grouping, *_unshuffled(captured, whole(facts)))
    return narrower, grouping


def _unshuffled(captured: Capture, facts: Provenance) -> tuple[Provenance, Grouping]:
    """The groups; where blocks are shuffled into each other, with the channels at one place of all blocks as one.

    Whether a graph shuffles is found by trial: blocks lose different places, and the sizes are checked.
    """
    grouping = group(facts)
    while True:
        blocked = [g for g in grouping.groups if g.blocks]
        guilty: dict[str, Group] = {}
        for number in range(max((len(g.blocks) for g in blocked), default=0)):
            untold = [g for g in blocked if number < len(g.blocks) and g.name not in guilty]
            trial = [(g, shaken(g, number)) for g in untold]
            failures = recompute(captured, facts, survivors(grouping, trial))[1] if trial else ()
            guilty |= {g.name: g for g in _hit(untold, grouping, failures)}
        if not guilty:
            return facts, grouping
        facts = aligned(facts, grouping, list(guilty.values()))
        grouping = group(facts)


def _hit(groups: Sequence[Group], grouping: Grouping, failures: Sequence[Failure]) -> list[Group]:
    """Those of some groups that hold labels of the failures."""
    failed: dict[str, bool] = {}
    for part in grouping.parts:
        atoms = torch.zeros(int(part.atom.max()) + 1, dtype=torch.bool)
        for failure in failures:
            atoms[part.atom[failure.labels]] = True
        failed |= {g.name: bool(atoms[g.atoms].any()) for g in part.groups}
    return [g for g in groups if failed[g.name]]


def in_scope(grouping: Grouping, options: Options) -> tuple[list[Group], tuple[Refusal, ...]]:
    """The groups that these options let in, and a refusal for each other."""
    inside, out = [], list(grouping.refusals)
    for g in grouping.everything:
        why = ""
        if ignored(g, options):
            why = "is ignored, as the options say"
        elif options.scope == "internal" and not g.internal:
            why = "is not internal: it has several writers, several readers, or a mixer"
        if why:
            out.append(Refusal(g.name, g.channels, why, ""))
        else:
            inside.append(g)
    return inside, tuple(out)


def replayed(groups: Sequence[Group], decided: Mapping[str, GroupPlan]) -> dict[str, tuple[int, ...]]:
    known = {g.name: g for g in groups}
    counts = {g.name: tuple(torch.bincount(g.cells).tolist()) for g in groups}
    for name, planned in decided.items():
        if name not in known or known[name].channels != planned.channels:
            has = f"has {known[name].channels} channels" if name in known else "is not there"
            raise FxMergeError(f"the plan's group {name} of {planned.channels} channels {has} in this model")
        kept = known[name].cells[list(planned.kept)]
        counts[name] = tuple(torch.bincount(kept, minlength=len(counts[name])).tolist())
        for block in known[name].blocks:
            if len({sum(counts[name][cell] for cell in row) for row in block}) > 1:
                raise FxMergeError(f"the plan keeps unequally many channels of the blocks of {name}")
    return counts


def provable(
    captured: Capture, facts: Provenance, grouping: Grouping, chosen: Chosen
) -> tuple[Chosen, dict[str, Call], list[Refusal]]:
    """Leave out groups whose narrowing makes a size in the graph wrong that cannot be put right."""
    refused: list[Refusal] = []
    nodes = {n.name: n for n in captured.module.graph.nodes}
    while True:
        edits, failures = recompute(captured, facts, survivors(grouping, chosen))
        if not failures:
            return chosen, edits, refused
        gone: set[str] = set()
        for failure in failures:
            guilty = _hit([g for g, _ in chosen], grouping, [failure])
            guilty = guilty or [g for g, _ in chosen]  # a size that follows a width it should not: decline all
            if gone.isdisjoint(g.name for g in guilty):  # else it may follow from those
                why = f"the sizes at {failure.node} cannot follow"
                refused += [Refusal(g.name, g.channels, why, source_line(nodes[failure.node])) for g in guilty]
                gone |= {g.name for g in guilty}
        chosen = [(g, kept) for g, kept in chosen if g.name not in gone]


def sliced(
    captured: Capture,
    facts: Provenance,
    grouping: Grouping,
    groups: Sequence[Group],
    counts: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
) -> fx.GraphModule:
    """The graph with so many channels left, nobody carrying the others: of the right sizes, good for a clock only."""
    narrowed = [g for g in groups if sum(counts[g.name]) < g.channels]
    chosen = [(g, select("l2", candidates(g, tensors, 0), g.cells, counts[g.name])) for g in narrowed]
    chosen, edits, _ = provable(captured, facts, grouping, chosen)
    return Rewriter(captured.module, facts).finish(survivors(grouping, chosen), edits)
