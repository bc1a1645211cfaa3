"""Groups that have the same role in repeated blocks, and keep equally many channels with `same_widths`.

These are groups of equal size whose producers have the same module paths up to indices: the MLPs of all layers of a
language model, say. A group may unite several blocks, as the layers that share one table of rotary angles. A
configuration with one number for all layers describes the merged model then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxmerge.ir.groups import Group, Refusal
from fxmerge.methods.allocation import Floats


def in_roles(groups: Sequence[Group], ladders: Mapping[str, Floats]) -> list[list[Group]]:
    """The groups by role, in the order in which the first of each comes. Groups with other rungs are apart."""
    found: dict[object, list[Group]] = {}
    for group in groups:
        rungs = ladders[group.name]
        found.setdefault((role(group), rungs.shape, rungs.tobytes()), []).append(group)
    return list(found.values())


def role(group: Group) -> tuple[object, ...]:
    """What groups of the same role have in common: the sizes of their cells, and the paths of their producers."""
    paths = (member.layer.module for member in group.producers)
    named = (".".join("*" if part.isdecimal() else part for part in path.split(".")) for path in paths)
    return tuple(dict.fromkeys(named)), tuple(torch.bincount(group.cells).tolist())


def without(
    groups: Sequence[Group], refused: Sequence[Refusal], same_widths: bool
) -> tuple[list[Group], list[Refusal]]:
    """(the groups that are not refused, refusals of others that would be left narrower than one of the same role)."""
    gone = {r.name for r in refused}
    at = {role(g): g.name for g in groups if g.name in gone} if same_widths else {}
    left = [g for g in groups if g.name not in gone]
    mates = [
        Refusal(g.name, g.channels, f"has to be as wide as {at[role(g)]}, by the option same_widths", "")
        for g in left
        if role(g) in at
    ]
    return [g for g in left if role(g) not in at], mates
