"""The groups that a merge may narrow: those that the options admit, or those of a plan that is replayed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from fxmerge.errors import FxMergeError
from fxmerge.ir.groups import Group, Grouping, Refusal
from fxmerge.options import Options
from fxmerge.plan import GroupPlan
from fxmerge.planning.counted import within


def check_patterns(groups: Sequence[Group], modules: Sequence[str], options: Options) -> None:
    """Raises FxMergeError for a pattern of `keep` or `ignore` that matches nothing, most likely a typing error."""
    known = [g.name for g in groups]
    for pattern in options.keep:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise FxMergeError(f"keep: {pattern!r} matches no group; the groups are {_some(known)}")
    for pattern in options.ignore:
        if not any(fnmatchcase(name, pattern) for name in (*known, *modules)):
            raise FxMergeError(f"ignore: {pattern!r} matches no module and no group; the groups are {_some(known)}")


def _some(known: Sequence[str]) -> str:
    return ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "") if known else "none"


def ignored(group: Group, options: Options) -> bool:
    """Whether a pattern of `ignore` matches the group, the module of one of its layers, or a parent of that module."""
    names = [group.name, *(m.layer.module for m in (*group.producers, *group.per_channel_params, *group.consumers))]
    return matched(names, options.ignore)


def matched(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches one of the names, or a parent of a module that is named."""
    return any(within(name, patterns) for name in dict.fromkeys(names))


def in_scope(grouping: Grouping, options: Options) -> tuple[list[Group], tuple[Refusal, ...]]:
    """The groups that these options admit, and a refusal for each of the others."""
    inside, out = [], list(grouping.refusals)
    for g in grouping.everything:
        why = ""
        if ignored(g, options):
            why = "is ignored: it matches a pattern of the option ignore"
        elif options.scope == "internal" and not g.internal:
            why = f'is excluded by scope="internal": {_not_internal(g)}'
        if why:
            out.append(Refusal(g.name, g.channels, why, ""))
        else:
            inside.append(g)
    return inside, tuple(out)


def _not_internal(group: Group) -> str:
    """Why a group is not that of one producer and one consumer alone."""
    found = [f"{len(group.producers)} layers produce these channels"] if len(group.producers) > 1 else []
    found += [f"{len(group.consumers) or 'no'} layers consume them"] if len(group.consumers) != 1 else []
    found += [f"{group.ties[0]} combines them with others"] if group.ties and len(group.producers) == 1 else []
    found += [f"{group.mixers[0]} normalises over them"] if group.mixers else []
    return ", ".join(found)


def replayed(groups: Sequence[Group], decided: Mapping[str, GroupPlan]) -> dict[str, tuple[int, ...]]:
    """{group: channels that a plan keeps in each cell}. Raises FxMergeError if the groups do not match the plan's."""
    known = {g.name: g for g in groups}
    counts = {g.name: tuple(torch.bincount(g.cells).tolist()) for g in groups}
    for name, planned in decided.items():
        if name not in known or known[name].channels != planned.channels:
            has = f"has {known[name].channels} channels" if name in known else "does not exist"
            raise FxMergeError(f"the plan's group {name} of {planned.channels} channels {has} in this model")
        kept = known[name].cells[list(planned.kept)]
        counts[name] = tuple(torch.bincount(kept, minlength=len(counts[name])).tolist())
        for block in known[name].blocks:
            if len({sum(counts[name][cell] for cell in row) for row in block}) > 1:
                raise FxMergeError(f"the plan keeps different numbers of channels in the rows of a block of {name}")
    return counts
