"""Meetings: where the outputs of a group's producers are added, multiplied or concatenated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from fxmerge.ir.groups import Meeting, Member
from fxmerge.ir.provenance import Provenance

_PRODUCTS = ("mul", "glu", "einsum", "matmul")  # rules that multiply their operands where both hold a channel


def meetings(facts: Provenance, order: Sequence[str], producers: Sequence[Member]) -> tuple[Meeting, ...]:
    """How the outputs of a group's producers meet, in execution order; none for one producer that meets nothing.

    order: the nodes that hold the group's channels, in execution order
    """
    found: list[Meeting] = []
    value: dict[str, int] = {}  # node -> the producer or the meeting that its channels come from

    def number(meeting: Meeting) -> int:
        if meeting not in found:
            found.append(meeting)
        return len(producers) + found.index(meeting)

    writing: dict[str, list[int]] = {}
    for index, producer in enumerate(producers):
        writing.setdefault(producer.layer.node, []).append(index)
    for node in order:
        mine = writing.get(node, [])
        if mine:
            value[node] = mine[0] if len(mine) == 1 else number(Meeting("either", tuple(mine)))
            continue
        meeting = [value[s] for s in facts.sources[node] if s in value]
        rule, operands = facts.rules.get(node, ""), tuple(dict.fromkeys(meeting))
        if rule == "div":
            operands = operands[:1]
        if len(operands) > 1:
            value[node] = number(Meeting(_op(rule, facts.kinds[node]), operands))
        elif operands and rule in _PRODUCTS and (rule == "glu" or len(meeting) > 1) and _twice(producers, operands[0]):
            value[node] = number(Meeting("halves", operands))
        elif operands:
            value[node] = operands[0]
    ends = _ends(value.values(), found)
    if len(ends) > 1:
        number(Meeting("either", ends))
    return tuple(found)


def _op(rule: str, kind: str) -> Literal["add", "sub", "mul", "either"]:
    if rule in _PRODUCTS:
        return "mul"
    return "either" if kind == "movement" else "sub" if rule == "sub" else "add"


def _twice(producers: Sequence[Member], index: int) -> bool:
    return index < len(producers) and producers[index].where.size(1) == 2


def _ends(values: Iterable[int], found: Sequence[Meeting]) -> tuple[int, ...]:
    """The producers and meetings that no other meeting uses."""
    used = {operand for meeting in found for operand in meeting.operands}
    return tuple(v for v in dict.fromkeys(values) if v not in used)
