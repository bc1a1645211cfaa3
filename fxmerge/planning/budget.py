"""How many channels each group keeps, so that the merged model costs as much as a budget allows.

FLOPs and parameters are computed without building the merged model (see `price.py`). Latency is measured: a budget of
FLOPs is allotted, a graph with those widths is timed against the original, and the share of FLOPs is adjusted until the
latency is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxmerge.analysis.feasible import all_of
from fxmerge.analysis.grouping import provable
from fxmerge.errors import FxMergeError
from fxmerge.graph.distributed import rank_and_size, summed
from fxmerge.graph.latency import Timing, compared
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import survivors
from fxmerge.methods.allocation import ALLOCATORS, Counts, Ints, Ladder, Price, Problem
from fxmerge.methods.selection import select
from fxmerge.options import TOLERANCE, Options
from fxmerge.planning.candidates import candidates
from fxmerge.planning.counted import named
from fxmerge.planning.room import Room
from fxmerge.progress import Stage
from fxmerge.rewrite.reassemble import assembled
from fxmerge.rewrite.rewriter import Rewriter

TRIES = 8  # graphs that are timed for a budget of latency, at most
BRIEF = 1.5  # seconds to time each of them
HOPELESS = 0.25  # noise above which a latency cannot be measured
PAIRED, MOVES = 8, range(-3, 4)  # groups and rungs that `_closer` tries


@dataclass(frozen=True)
class Allotted:
    """{group: channels kept in each cell}, and notes for the report."""

    counts: Counts
    notes: tuple[str, ...] = ()


def allot(room: Room, tensors: Mapping[str, Tensor], stage: Stage, error: Callable[[Counts], float]) -> Allotted:
    """The channels that each group keeps. Raises FxMergeError if the budget cannot be met.

    error: of the model's outputs with these channel counts. `uniform` is used instead of another allocation where it
           loses less
    """
    room = replace(room, groups=[g for together in room.roles for g in together])  # prices are laid out in this order
    own = _allotted(room, tensors, stage)
    if room.options.allocation == "uniform" or all(sum(own.counts[g.name]) == g.channels for g in room.groups):
        return own
    try:
        plain = _allotted(replace(room, options=room.options.replace(allocation="uniform")), tensors, stage)
    except FxMergeError:  # a latency that it does not reach
        return own
    if plain.counts == own.counts:
        return own
    stage("allocations compared")
    found = {name: error(one.counts) for name, one in ((room.options.allocation, own), ("uniform", plain))}
    if not found["uniform"] < found[room.options.allocation]:
        return own
    why = f"{room.options.allocation} gives outputs with an error of {found[room.options.allocation]:.2g}"
    note = f"the allocation is uniform: before refit, {why}, and uniform of {found['uniform']:.2g}"
    return Allotted(plain.counts, (*plain.notes, note))


def _allotted(room: Room, tensors: Mapping[str, Tensor], stage: Stage) -> Allotted:
    """The channels that each group keeps by the allocation of the options."""
    ((kind, share),) = room.options.budget.items()
    if kind == "latency":
        return _timed(room, share, tensors, stage)
    price, cut = room.price(kind), room.captured.cut
    share = share if cut is None else min(1.0, share / cut.left[kind])
    counts = by_budget(room, price, kind, share)
    reached = price(counts) / price.original
    if share == 1 or abs(reached / share - 1) <= TOLERANCE[kind]:
        return Allotted(counts)
    if room.options.keep and all(sum(counts[name]) == kept[0].sum() for name, kept in room.ladders.items()):
        return Allotted(counts, ("the channels given by keep leave less than the budget allows",))
    multiples = (
        f": kept channels are multiples of round_to, {room.options.round_to}" if room.options.round_to > 1 else ""
    )
    return Allotted(counts, (f"no allowed channel counts come closer to the budget{multiples}",))


def _timed(room: Room, share: float, tensors: Mapping[str, Tensor], stage: Stage) -> Allotted:
    """Adjusts the share of FLOPs, by false position, until the graph with those widths has the latency asked for."""
    price, captured = room.price("flops"), room.captured
    tolerance = TOLERANCE["latency"]
    known: list[tuple[float, float, Counts]] = [(1.0, _uncut(captured), {g.name: all_of(g) for g in room.groups})]
    lowest = {g.name: tuple(int(k) for k in room.ladders[g.name][-1]) for g in room.groups}
    least, noise, asked = price(lowest) / price.original, 0.0, max(share, price(lowest) / price.original)
    for _ in range(TRIES if share < known[0][1] else 0):
        counts: Counts = by_budget(room, price, "flops", asked)
        stage(f"latency at {asked:.0%} of the FLOPs")
        cut = sliced(room, counts, tensors)
        timing = compared(original_of(captured), assembled(captured, cut), captured.args, captured.kwargs, BRIEF)
        timing = _agreed(captured, timing)
        noise = max(noise, timing.noise)
        if noise > HOPELESS:
            raise FxMergeError(
                f"the latency cannot be measured on this machine: repeated timings of the original, which takes "
                f"{timing.seconds * 1e3:.3g} ms, differ by {noise:.0%}; give larger inputs, use a machine with less "
                "load, or give a budget of flops"
            )
        flops, took = price(counts) / price.original, timing.share
        known.append((flops, took, counts))
        if abs(took / share - 1) <= tolerance / 2:
            break
        if took > share and flops <= least * (1 + TOLERANCE["flops"]):
            if took > share * (1 + tolerance + 2 * noise):
                raise FxMergeError(
                    f"the budget asks for {share:.1%} of the latency, but {took:.1%} is left at {flops:.1%} of the "
                    f"FLOPs, the fewest possible; {remedies(room.options)}"
                )
            break
        over = min((p for p in known if p[1] > share), key=lambda p: p[1])
        under = max((p for p in known if p[1] <= share), key=lambda p: p[1], default=None)
        if under is None:
            asked = max(least, 0.9 * flops * share / took)
        else:
            part = min(0.9, max(0.1, (share - under[1]) / (over[1] - under[1])))
            asked = under[0] + part * (over[0] - under[0])
            if any(abs(asked / p[0] - 1) < 1e-3 for p in known):  # there are no widths in between
                break
    _, took, counts = min(known, key=lambda p: abs(p[1] - share))
    notes = []
    if share < 1 and abs(took / share - 1) > tolerance:
        notes.append(f"none of the graphs that were timed came closer to the requested latency than {took:.1%}")
    if noise > tolerance:
        notes.append(f"the noise of the latency is {noise:.1%}, above the tolerance of {tolerance:.0%}")
    return Allotted(counts, tuple(notes))


def _uncut(captured: Capture) -> float:
    """The latency of a capture with all channels, as a share of the original's."""
    if captured.cut is None:
        return 1.0
    timing = compared(original_of(captured), captured.module, captured.args, captured.kwargs, BRIEF)
    return _agreed(captured, timing).share


def _agreed(captured: Capture, timing: Timing) -> Timing:
    """The mean over all processes, so that all of them make the same decisions."""
    device = next((v.device for v in captured.inputs if isinstance(v, Tensor)), None)
    own = torch.tensor([timing.share, timing.noise, timing.seconds], dtype=torch.float64, device=device)
    share, noise, seconds = (summed(own) / rank_and_size()[1]).tolist()
    return Timing(share=share, noise=noise, seconds=seconds)


def original_of(captured: Capture) -> nn.Module:
    """The original model, as a merged model is compared with it."""
    return captured.whole.module if captured.recorded is None else captured.recorded.host


def by_budget(room: Room, price: Price, kind: str, share: float) -> dict[str, tuple[int, ...]]:
    """{group: channels kept in each cell}, at a price of at most `share` of the original's, as close as rungs allow.

    kind: what the price counts, a key of NAMES. Raises FxMergeError if the lowest rungs cost more.
    """
    roles, ladders, options = room.roles, room.ladders, room.options
    slots = {r[0].name: slice(price.slots[r[0].name].start, price.slots[r[-1].name].stop) for r in roles}
    joint = tuple(
        Ladder(np.hstack([ladders[g.name] for g in role]), np.sum([room.errors[g.name] for g in role], axis=0))
        for role in roles
    )
    problem = Problem(joint, replace(price, slots=slots), share * price.original)
    if problem.cost(problem.bottom) > problem.target * (1 + TOLERANCE[kind]):
        least, free = problem.cost(problem.bottom) / price.original, len(room.free)
        where = f"when the {free} groups in scope that may narrow drop as many channels as they may"
        raise FxMergeError(
            f"the budget asks for {share:.1%} of the {named(kind, options.of)}, but {least:.1%} are left "
            f"{where if free else 'since no group may narrow'}; {remedies(options, bool(free))}"
        )
    full = np.zeros(len(roles), dtype=np.int64)
    chosen = full if problem.cost(full) <= problem.target or share >= 1 else ALLOCATORS[options.allocation](problem)
    chosen = _closer(problem, chosen, TOLERANCE[kind])
    return {
        g.name: tuple(int(k) for k in ladders[g.name][rung])
        for role, rung in zip(roles, chosen, strict=True)
        for g in role
    }


def _closer(problem: Problem, chosen: Ints, tolerance: float) -> Ints:
    """Rungs whose cost is closer to the target, where it is further below than the tolerance.

    Moves two of the PAIRED groups whose rungs cost least, up or down by MOVES rungs.
    """
    cost, bottom = problem.cost(chosen), problem.bottom
    if cost >= problem.target * (1 - tolerance):
        return chosen
    one = np.eye(len(chosen), dtype=np.int64)
    steps = [abs(problem.cost(chosen + (one[g] if chosen[g] < bottom[g] else -one[g])) - cost) for g in range(len(one))]
    fine = [g for g in np.argsort(steps, kind="stable").tolist() if bottom[g] > 0][:PAIRED]
    moves = [a * one[g] + b * one[h] for g in fine for h in fine for a in MOVES for b in MOVES if g <= h]
    tried = [m for move in moves if ((m := chosen + move) >= 0).all() and (m <= bottom).all()]
    able = [rungs for rungs in tried if problem.cost(rungs) <= problem.target * (1 + tolerance)]
    return min([chosen, *able], key=lambda rungs: abs(problem.cost(rungs) - problem.target))


def remedies(options: Options, narrow: bool = True) -> str:
    """The changes to the options that make a budget easier to meet. narrow: whether any group may narrow."""
    found = ["ask for a larger share"]
    if narrow:
        found.append(f"raise max_ratio (now {options.max_ratio:g})")
    if options.scope == "internal":
        found.append('widen scope to "all"')
    if options.keep or options.ignore:
        found.append("remove groups from keep and ignore")
    if options.round_to > 1:
        found.append(f"lower round_to (now {options.round_to})")
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def sliced(room: Room, counts: Counts, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph with these channel counts, for timing: dropped channels are not merged into the kept ones."""
    narrowed = [g for g in room.groups if sum(counts[g.name]) < g.channels]
    chosen = [(g, select("l2", candidates(g, room.captured, tensors, 0), g.cells, counts[g.name])) for g in narrowed]
    chosen, edits, _ = provable(room.captured, room.facts, room.grouping, chosen)
    return Rewriter(room.captured.module, room.facts).finish(survivors(room.grouping, chosen), edits)
