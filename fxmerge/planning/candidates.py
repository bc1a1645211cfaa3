"""The candidates of a group: what selectors choose the kept channels by.

A channel is ranked by the rows of its producers. Where their outputs are added, rows are concatenated. Where they are
multiplied, as by a gate, the row of the product is the outer product of the factors' rows, so that a channel that one
factor closes is small however large the other is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Member
from fxmerge.methods.evidence import Candidates, Reading, Term
from fxmerge.methods.linalg import as_real
from fxmerge.planning.channel_ops import Level, in_order, laid_out, steps_at
from fxmerge.planning.statistics import is_norm, producer_constants, producer_rows
from fxmerge.weights.layout import out_first


def candidates(
    group: Group, captured: Capture, tensors: Mapping[str, Tensor], seed: int, readings: tuple[Reading, ...] = ()
) -> Candidates:
    """The input of a selector: the rows of a group's producers, and the kernels of the first producer."""
    per_channel_params, n = group.params_at, group.channels
    parts: list[tuple[Tensor, ...]] = []
    for producer in group.producers:
        raw = producer_rows(producer, tensors[producer.layer.params["weight"]], n)
        own = [raw]
        if "bias" in producer.layer.params and not any(is_norm(name, per_channel_params) for name in producer.steps):
            own.append(producer_constants(producer, tensors, n).to(raw))
        parts.append(tuple(own))
    first = group.producers[0]
    weight = tensors[first.layer.params["weight"]]
    rows = out_first(weight, first.layer)
    kernels = as_real(rows if in_order(first, len(rows)) else rows[first.where[:, 0]])
    kernels = kernels.flatten(2) if kernels.dim() > 2 else kernels[:, :, None]
    filters = laid_out(kernels, first, n, 0.0)
    if not any(meeting.op in ("mul", "halves") for meeting in group.meetings):
        return Candidates(tuple(part for own in parts for part in own), filters, seed, readings)
    factors, terms = _factors(group, parts, captured, tensors)
    return Candidates(factors, filters, seed, readings, terms=terms)


def _factors(
    group: Group, parts: Sequence[tuple[Tensor, ...]], captured: Capture, tensors: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Term, ...]]:
    """The rows of producers whose outputs meet in products, and the sums and products that they make.

    parts: the rows and constants of each producer
    """
    n = group.channels
    halved = {meeting.operands[0] for meeting in group.meetings if meeting.op == "halves"}
    factors: list[Tensor] = []
    of_producer: list[tuple[int, ...]] = []  # the factors of each producer: one, or its two halves
    for number, (producer, own) in enumerate(zip(group.producers, parts, strict=True)):
        first = len(factors)
        if number in halved:
            factors += [torch.cat([part.view(n, 2, -1)[:, half] for part in own], 1) for half in (0, 1)]
        else:
            rest = _at_rest(producer, group, captured, tensors)
            factors.append(torch.cat([*own, *([rest[:, None].to(own[0])] if bool(rest.any()) else [])], 1))
        of_producer.append(tuple(range(first, len(factors))))
    terms: list[Term] = []
    place: list[int] = []  # where each producer, and then each meeting, is among the factors and terms

    def add(term: Term) -> int:
        terms.append(term)
        return len(factors) + len(terms) - 1

    for own_factors in of_producer:
        place.append(own_factors[0] if len(own_factors) == 1 else add(Term(True, own_factors)))
    for meeting in group.meetings:
        operands = tuple(place[operand] for operand in meeting.operands)
        place.append(operands[0] if meeting.op == "halves" else add(Term(meeting.op == "mul", operands)))
    return tuple(factors), tuple(terms)


def _at_rest(producer: Member, group: Group, captured: Capture, tensors: Mapping[str, Tensor]) -> Tensor:
    """What nonlinear steps make of a producer's output of 0, (n,): 1/2 for a sigmoid, as a gate of 0 is not closed."""
    n, members = group.channels, group.params_at
    nodes = {node.name: node for node in captured.module.graph.nodes}
    value, level = torch.zeros(1, n, dtype=torch.float64), Level(torch.ones(n).double(), torch.zeros(n).double())
    for name in producer.steps:
        for step in steps_at(nodes[name], members.get(name, ()), captured, tensors, level):
            value = value * step.gain if step.function is None else step.function(value)
    return value[0]
