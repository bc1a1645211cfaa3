"""Which residual branches may be dropped for a budget, in which order, and how many of them are tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from math import isfinite

from fxmerge.ir.branches import Branch, Measured
from fxmerge.ir.groups import Group
from fxmerge.options import TOLERANCE, Options
from fxmerge.planning.scope import matched

REFINED = 2  # rounds in which numbers between those that were tried are tried


def droppable(branches: Sequence[Branch], groups: Sequence[Group], options: Options) -> list[Branch]:
    """The branches that no pattern of `ignore` protects, nor one of `keep` by a group that is produced inside."""
    found = []
    for branch in branches:
        inside = set(branch.nodes)
        own = [g.name for g in groups if all(m.layer.node in inside for m in g.producers)]
        held = any(fnmatchcase(name, pattern) for pattern in options.keep for name in own)
        if not held and not matched([branch.name, *branch.layers], options.ignore):
            found.append(branch)
    return found


def in_order(measured: Sequence[Measured], kind: str, whole: float, share: float) -> list[Measured]:
    """The branches that can be dropped within a budget, those with the least loss per cost first.

    kind:   of the budget; branches are priced in FLOPs for a latency
    whole:  the cost of the model
    share:  of it that may remain. What would leave less is passed over
    """
    cost = {one.name: one.parameters if kind == "params" else one.flops for one in measured}
    spare, found = whole * (1 - share * (1 - TOLERANCE[kind])) if share < 1 else 0.0, list[Measured]()
    for one in sorted(measured, key=lambda one: one.loss / max(cost[one.name], 1)):
        fits = 0 < cost[one.name] <= spare and not any(one.branch.overlaps(other.branch) for other in found)
        if fits:
            found.append(one)
            spare -= cost[one.name]
    return found


def searched(error: Callable[[int], float], most: int) -> dict[int, float]:
    """{number: error} of the numbers of dropped branches that were tried, 0 and some of up to `most`.

    Numbers are doubled until two in turn bring no improvement; then those halfway to the best one's neighbours are
    tried.
    """
    found, worse, number = {0: error(0)}, 0, 1
    while number <= most and worse < 2:
        least = min(found.values())
        found[number] = error(number)
        worse = 0 if found[number] < least or not isfinite(least) else worse + 1
        number = most if number < most < 2 * number else 2 * number
    for _ in range(REFINED):
        best = min(found, key=lambda n: (found[n], n))
        known = sorted(found)
        place = known.index(best)
        around = [(best + other) // 2 for other in known[max(0, place - 1) : place + 2]]
        for number in around:
            if number not in found:
                found[number] = error(number)
    return found
