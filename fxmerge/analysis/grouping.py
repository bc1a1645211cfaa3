"""Grouping: the merge groups of a graph, and whether the channels chosen from them can be removed from the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxmerge.analysis.feasible import shaken
from fxmerge.analysis.groups import aligned, group, joined
from fxmerge.analysis.literal_sizes import Failure, recompute
from fxmerge.analysis.places import upright
from fxmerge.analysis.stacks import apart
from fxmerge.analysis.whole_blocks import whole, width
from fxmerge.errors import source_line
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal, survivors
from fxmerge.ir.provenance import Provenance
from fxmerge.rules.resize import Call

Chosen = list[tuple[Group, Tensor]]  # groups that lose channels, and the channels that they keep


def grouped(captured: Capture, facts: Provenance, heads: str) -> tuple[Provenance, Grouping]:
    """The groups, for blocks that lose width, leave whole, or both (`Options.heads`)."""
    facts = apart(captured, facts)
    if heads == "whole":
        return _unshuffled(captured, upright(whole(facts)))
    narrower, grouping = _unshuffled(captured, upright(width(facts)))
    if heads == "both":
        grouping = joined(grouping, *_unshuffled(captured, upright(whole(facts))))
    return narrower, grouping


def _unshuffled(captured: Capture, facts: Provenance) -> tuple[Provenance, Grouping]:
    """The groups. Where the graph shuffles channels between blocks, those at one place of all blocks are tied.

    Whether the graph shuffles is found by a trial, in which blocks lose different places and the sizes are checked.
    """
    grouping = group(captured, facts)
    while True:
        blocked = [g for g in grouping.groups if g.blocks]
        guilty: dict[str, Group] = {}
        for number in range(max((len(g.blocks) for g in blocked), default=0)):
            untried = [g for g in blocked if number < len(g.blocks) and g.name not in guilty]
            trial = [(g, shaken(g, number)) for g in untried]
            failures = recompute(captured, facts, survivors(grouping, trial))[1] if trial else ()
            guilty |= {g.name: g for g in _hit(untried, grouping, failures)}
        if not guilty:
            return facts, grouping
        facts = aligned(facts, grouping, list(guilty.values()))
        grouping = group(captured, facts)


def _hit(groups: Sequence[Group], grouping: Grouping, failures: Sequence[Failure]) -> list[Group]:
    """The groups that hold labels of the failures."""
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
    """Leave out groups that would make a size in the graph wrong that cannot be corrected.

    Returns the groups that are left, the calls with new literal sizes by node, and the refusals.
    """
    refused: list[Refusal] = []
    nodes = {n.name: n for n in captured.module.graph.nodes}
    while True:
        edits, failures = recompute(captured, facts, survivors(grouping, chosen))
        if not failures:
            return chosen, edits, refused
        gone: set[str] = set()
        for failure in failures:
            guilty = _hit([g for g, _ in chosen], grouping, [failure])
            # a size that depends on no label that is known: the groups that make it wrong are found by trial
            guilty = guilty or _culprits(captured, facts, grouping, chosen, failure.node)
            if gone.isdisjoint(g.name for g in guilty):  # else it may be a consequence of an earlier failure
                where = source_line(nodes[failure.node])
                refused += [Refusal(g.name, g.channels, failure.reason, where) for g in guilty]
                gone |= {g.name for g in guilty}
        chosen = [(g, kept) for g, kept in chosen if g.name not in gone]


def _culprits(captured: Capture, facts: Provenance, grouping: Grouping, chosen: Chosen, node: str) -> list[Group]:
    """The groups by which the sizes at a node cannot follow: halves of them are tried, down to single groups."""
    if len(chosen) > 1:
        half = len(chosen) // 2
        guilty = []
        for part in (chosen[:half], chosen[half:]):
            if any(f.node == node for f in recompute(captured, facts, survivors(grouping, part))[1]):
                guilty += _culprits(captured, facts, grouping, part, node)
        if guilty:
            return guilty
    return [g for g, _ in chosen]  # one group, or groups that are wrong together only
