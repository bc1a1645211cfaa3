"""Budgeting: what each group keeps, so that the merged model costs what a budget allows.

FLOPs and parameters are priced without building anything. Latency is measured: FLOPs are shared out, the graph of those
widths is cut and timed beside the original, and the share of FLOPs is moved until the time is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxmerge.analysis.feasible import all_of
from fxmerge.analysis.grouping import provable
from fxmerge.calibration.epilogue import SOLVED
from fxmerge.errors import FxMergeError
from fxmerge.graph.distributed import rank_and_size, summed
from fxmerge.graph.latency import TOLERANCE as TIME_TOLERANCE
from fxmerge.graph.latency import Timing, compared
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, survivors
from fxmerge.ir.provenance import Layer, Provenance, can_shift
from fxmerge.methods.allocation import ALLOCATORS, Counts, Floats, Ints, Ladder, Price, Problem
from fxmerge.methods.selection import select
from fxmerge.options import NAMES, Options
from fxmerge.planning.counts import TOLERANCE
from fxmerge.planning.price import flops_price, parameters_price
from fxmerge.planning.statistics import candidates
from fxmerge.rewrite.reassemble import assembled
from fxmerge.rewrite.rewriter import Rewriter

TRIES, BRIEF = 8, 1.5  # models timed, at most, and for so many seconds
HOPELESS = 0.25  # noise of a clock that tells nothing


@dataclass(frozen=True)
class Allotted:
    """{group: channels kept in each cell}, and what there is to say about it."""

    counts: Counts
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Room:
    """What a budget is shared out in: groups, the rungs of each, the error at each rung."""

    captured: Capture
    facts: Provenance
    grouping: Grouping
    groups: Sequence[Group]
    ladders: Mapping[str, Floats]
    errors: Mapping[str, Floats]
    options: Options
    refitted: bool  # will layers be re-solved, and be given biases?
    flops: Mapping[str, int]  # of the original's nodes

    def price(self, kind: str) -> Price:
        parts = (self.facts, self.groups, self.grouping.atom)
        if kind == "flops":
            return flops_price(*parts, self.flops)
        return parameters_price(self.captured, *parts, self.gaining())

    def gaining(self) -> list[Layer]:
        """The layers that refit will give a bias: those without one that stand behind a group that narrows."""
        if not self.refitted:
            return []
        free = [g for g in self.groups if len(self.ladders[g.name]) > 1]
        moved = {m.layer.node for g in free for m in (*g.producers, *g.per_channel_params)}
        used = Counter(layer.params["weight"] for layer in self.facts.layers if "weight" in layer.params)
        layers, found = {layer.node: layer for layer in self.facts.layers if layer.op in SOLVED}, []
        for node in self.captured.module.graph.nodes:
            if any(source.name in moved for source in node.all_input_nodes):
                moved.add(node.name)
                layer = layers.get(node.name)
                if layer and "bias" not in layer.params and can_shift(layer) and used[layer.params["weight"]] == 1:
                    found.append(layer)
        return found


def allot(room: Room, tensors: Mapping[str, Tensor], stage: Callable[[str], None]) -> Allotted:
    """What each group keeps. Raises FxMergeError where the budget cannot be met."""
    ((kind, share),) = room.options.budget.items()
    if kind == "latency":
        return _timed(room, share, tensors, stage)
    price = room.price(kind)
    counts = by_budget(room.groups, room.options, room.ladders, room.errors, price, share, NAMES[kind])
    reached = price(counts) / price.original
    if share == 1 or abs(reached / share - 1) <= TOLERANCE:
        return Allotted(counts)
    if room.options.keep and all(sum(counts[name]) == kept[0].sum() for name, kept in room.ladders.items()):
        return Allotted(counts, ("what keep asks for leaves less than the budget does",))
    multiples = (
        f": kept channels are multiples of round_to, {room.options.round_to}" if room.options.round_to > 1 else ""
    )
    return Allotted(counts, (f"no widths that groups may have come nearer to the budget{multiples}",))


def _timed(room: Room, share: float, tensors: Mapping[str, Tensor], stage: Callable[[str], None]) -> Allotted:
    """The share of FLOPs is moved, by false position, until the graph cut to it takes the time that is allowed."""
    price, captured = room.price("flops"), room.captured
    known: list[tuple[float, float, Counts]] = [(1.0, 1.0, {g.name: all_of(g) for g in room.groups})]
    lowest = {g.name: tuple(int(k) for k in room.ladders[g.name][-1]) for g in room.groups}
    least, noise, asked = price(lowest) / price.original, 0.0, max(share, price(lowest) / price.original)
    for _ in range(TRIES if share < 1 else 0):
        counts: Counts = by_budget(room.groups, room.options, room.ladders, room.errors, price, asked, "FLOPs")
        stage(f"latency at {asked:.0%} of the FLOPs")
        cut = sliced(captured, room.facts, room.grouping, room.groups, counts, tensors)
        timing = compared(original_of(captured), assembled(captured, cut), captured.args, captured.kwargs, BRIEF)
        timing = _agreed(captured, timing)
        noise = max(noise, timing.noise)
        if noise > HOPELESS:
            raise FxMergeError(
                f"latency cannot be measured here: the original differs from itself by {noise:.0%} of its "
                f"{timing.seconds * 1e3:.3g} ms; give larger inputs, a quieter machine, or a budget of flops"
            )
        flops, took = price(counts) / price.original, timing.share
        known.append((flops, took, counts))
        if abs(took / share - 1) <= TIME_TOLERANCE / 2:
            break
        if took > share and flops <= least * (1 + TOLERANCE):
            if took > share * (1 + TIME_TOLERANCE + 2 * noise):
                raise FxMergeError(
                    f"the budget asks for {share:.1%} of the latency, but {took:.1%} is left at {flops:.1%} of the "
                    f"FLOPs, the least there can be; {remedies(room.options)}"
                )
            break
        over = min((p for p in known if p[1] > share), key=lambda p: p[1])
        under = max((p for p in known if p[1] <= share), key=lambda p: p[1], default=None)
        if under is None:
            asked = max(least, 0.9 * flops * share / took)
        else:
            part = min(0.9, max(0.1, (share - under[1]) / (over[1] - under[1])))
            asked = under[0] + part * (over[0] - under[0])
            if any(abs(asked / p[0] - 1) < 1e-3 for p in known):  # no widths in between
                break
    _, took, counts = min(known, key=lambda p: abs(p[1] - share))
    notes = []
    if share < 1 and abs(took / share - 1) > TIME_TOLERANCE:
        notes.append(f"of the widths timed none came nearer to the latency asked for than {took:.1%}")
    if noise > TIME_TOLERANCE:
        notes.append(f"the latency's noise is {noise:.1%}, more than the {TIME_TOLERANCE:.0%} it should be met within")
    return Allotted(counts, tuple(notes))


def _agreed(captured: Capture, timing: Timing) -> Timing:
    """The mean over all processes, so that all of them decide the same."""
    device = next((v.device for v in captured.inputs if isinstance(v, Tensor)), None)
    told = torch.tensor([timing.share, timing.noise, timing.seconds], dtype=torch.float64, device=device)
    return Timing(*(summed(told) / rank_and_size()[1]).tolist())


def original_of(captured: Capture) -> nn.Module:
    """What a merged model is timed beside."""
    return captured.module if captured.recorded is None else captured.recorded.host


PAIRED, MOVES = 8, range(-3, 4)  # groups that are moved to come nearer to a budget, by so many rungs


def by_budget(
    groups: Sequence[Group],
    options: Options,
    ladders: Mapping[str, Floats],
    errors: Mapping[str, Floats],
    price: Price,
    share: float,
    what: str,
) -> dict[str, tuple[int, ...]]:
    """{group: channels kept in each cell} at a price of `share` of the original's, or less where rungs allow no nearer.

    Raises FxMergeError where the lowest rungs cost more.
    """
    steps = tuple(Ladder(ladders[g.name], errors[g.name]) for g in groups)
    problem = Problem(steps, price, share * price.original)
    full = np.zeros(len(steps), dtype=np.int64)
    if problem.cost(problem.bottom) > problem.target * (1 + TOLERANCE):
        least, free = problem.cost(problem.bottom) / price.original, int((problem.bottom > 0).sum())
        where = f"where the {free} groups in scope that may narrow give up what they may" if free else "at the least"
        told = f"the budget asks for {share:.1%} of the {what}, but {least:.1%} are left {where}"
        raise FxMergeError(
            f"{told}; {remedies(options)}" if free else f"{told}: no group may narrow; {remedies(options, False)}"
        )
    chosen = full if problem.cost(full) <= problem.target or share >= 1 else ALLOCATORS[options.allocation](problem)
    chosen = _nearer(problem, chosen)
    return {g.name: tuple(int(k) for k in ladders[g.name][rung]) for g, rung in zip(groups, chosen, strict=True)}


def _nearer(problem: Problem, chosen: Ints) -> Ints:
    """Where a budget is met by far: some rungs up or down in two of the groups whose rungs cost least."""
    cost, bottom = problem.cost(chosen), problem.bottom
    if cost >= problem.target * (1 - TOLERANCE):
        return chosen
    one = np.eye(len(chosen), dtype=np.int64)
    steps = [abs(problem.cost(chosen + (one[g] if chosen[g] < bottom[g] else -one[g])) - cost) for g in range(len(one))]
    fine = [g for g in np.argsort(steps, kind="stable").tolist() if bottom[g] > 0][:PAIRED]
    moves = [a * one[g] + b * one[h] for g in fine for h in fine for a in MOVES for b in MOVES if g <= h]
    tried = [m for move in moves if ((m := chosen + move) >= 0).all() and (m <= bottom).all()]
    able = [rungs for rungs in tried if problem.cost(rungs) <= problem.target * (1 + TOLERANCE)]
    return min([chosen, *able], key=lambda rungs: abs(problem.cost(rungs) - problem.target))


def remedies(options: Options, narrow: bool = True) -> str:
    """What makes a budget easier to meet, of what these options hold it back by; `narrow`: may any group narrow?"""
    found = ["ask for a larger share"]
    if narrow:
        found.append(f"raise max_ratio (now {options.max_ratio:g})")
    if options.scope == "internal":
        found.append('widen scope to "all"')
    if options.keep or options.ignore:
        found.append("let go of groups that keep and ignore hold")
    if options.round_to > 1:
        found.append(f"lower round_to (now {options.round_to})")
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


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
