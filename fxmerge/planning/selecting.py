"""Which channels a group keeps, or whether it keeps principal components instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from fxmerge.analysis.grouping import Chosen, provable
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, Refusal
from fxmerge.ir.provenance import Provenance
from fxmerge.methods.allocation import Counts
from fxmerge.methods.elimination import Orders
from fxmerge.methods.evidence import Reading
from fxmerge.methods.selection import select
from fxmerge.options import Options
from fxmerge.planning.candidates import candidates
from fxmerge.planning.components import able, components_of
from fxmerge.progress import Stage
from fxmerge.rules.resize import Call


@dataclass(frozen=True)
class Selected:
    """The groups that narrow, with the channels that they keep; edits of sizes; and refusals.

    turned: the groups that keep components, in the places of these channels
    """

    chosen: Chosen
    edits: Mapping[str, Call]
    refused: Sequence[Refusal]
    turned: frozenset[str]


def wanted(groups: Sequence[Group], options: Options) -> list[Group]:
    """The groups whose consumers' second moments the selection needs, where there are data."""
    return [g for g in groups if options.selection == "repair" or able(g, options)]


def selected(
    groups: Sequence[Group], counts: Counts, captured: Capture, facts: Provenance, grouping: Grouping,
    tensors: Mapping[str, Tensor], options: Options, readings: Mapping[str, tuple[Reading, ...]],
    orders: Orders, stage: Stage,
) -> Selected:  # fmt: skip
    """The channels that each of these groups keeps, `counts` of them in each of its cells.

    By `auto`, a group keeps components where they lose less; by `pca`, wherever its paths are linear.
    """
    chosen: Chosen = []
    turned = set()
    work = [float(g.channels) ** 3 for g in groups]  # as of factorising their Grams
    for g, done in zip(groups, accumulate(work, initial=0.0), strict=False):
        stage(f"selection {g.name}", done / sum(work))
        own = readings.get(g.name, ())
        turns = able(g, options) and captured.cut is None  # the original of a cut graph is another graph
        parts = components_of(g, captured, tensors, options, own)[0] if turns else None
        if parts is None or options.decomposition != "pca":
            seen = candidates(g, captured, tensors, options.seed, own if options.selection == "repair" else ())
            kept = select(options.selection, replace(seen, orders=orders), g.cells, counts[g.name])
        if parts is not None and (options.decomposition == "pca" or parts.lose_less(kept)):
            kept = parts.first(counts[g.name])
            turned.add(g.name)
        chosen.append((g, kept))
    return Selected(*provable(captured, facts, grouping, chosen), frozenset(turned))
