"""Narrowing: which groups may be touched, and whether what is chosen of them can be cut out of the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxmerge.analysis.feasible import shaken
from fxmerge.analysis.groups import aligned, group, joined
from fxmerge.analysis.literal_sizes import Failure, recompute
from fxmerge.analysis.whole_blocks import whole, width
from fxmerge.errors import source_line
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal, survivors
from fxmerge.ir.provenance import Provenance
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
