"""Choices whose merged model the user's class takes, for the option `own_class`.

Some classes cannot take narrower layers: a size is written in their code, or one attribute is read for several layers.
Before anything is refitted, the class is tried with the widths of a choice, dropped channels simply cut. Where it does
not take them, the groups that are found by trial to stand in its way (`export.left_whole`) are left whole, and the
widths of all others are chosen anew.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxmerge import verify
from fxmerge.errors import FxMergeError
from fxmerge.export.own_model import advised
from fxmerge.options import Options
from fxmerge.pipeline import Prepared
from fxmerge.plan import Plan
from fxmerge.planning.draft import Choice
from fxmerge.report.reports import Report
from fxmerge.rewrite.reassemble import assembled

TRIES = 4  # choices for each way to share out a budget; each leaves more groups whole


def for_class(ready: Prepared, options: Options) -> Choice:
    """A choice that the class takes, with a note on what was changed for it; the plain one if none is found."""
    plain = ready.choose(options)
    if not plain.chosen:
        return plain
    if ready.captured.model is None or isinstance(ready.captured.model, fx.GraphModule):
        return _noted(plain, f"a graph of {ready.captured.name} was given, and no model of its class")
    ways = [options]
    if options.budget and not options.same_widths:
        ways.append(options.replace(same_widths=True))
    why = ""
    for own in ways:
        for _ in range(TRIES):
            try:
                choice = plain if own is options else ready.choose(own)
            except FxMergeError as error:  # a budget that the other groups cannot meet
                why = why or f"{_changed(options, own)}, but then {error}"
                break
            if not choice.chosen:  # all groups have to stay whole
                break
            ready.stage("own class")
            taken, patterns = advised(_sketch(ready, choice))
            if taken:
                return _noted(choice, _changed(options, own)) if own is not options else choice
            if not patterns:
                break
            rest = {name: kept for name, kept in own.keep.items() if name not in patterns}
            own = own.replace(keep={**dict.fromkeys(patterns, 1.0), **rest})  # the first that matches is valid
    return _noted(plain, f"not found: {why or 'no groups are known without which the class takes the merge'}")


def _changed(options: Options, own: Options) -> str:
    left = [pattern for pattern, kept in own.keep.items() if options.keep.get(pattern) != kept]
    same = "layers of one kind share a width" if own.same_widths and not options.same_widths else ""
    whole = f"{', '.join(left)} stay{'s' if len(left) == 1 else ''} whole" if left else ""
    return " and ".join(filter(None, (same, whole)))


def _noted(choice: Choice, text: str) -> Choice:
    return replace(choice, notes=(*choice.notes, f"own_class: {text}"))


def _sketch(ready: Prepared, choice: Choice) -> Report:
    """The merge of a choice with its dropped channels cut, and nothing refitted: only sizes matter here."""
    captured, (facts, grouping) = ready.captured, ready.found
    cut = choice.options.replace(decomposition="prune")
    draft = ready.draft(replace(choice, options=cut, batches=[], turned=frozenset()))
    module = assembled(captured, draft.graph)
    return Report(
        captured=captured, facts=facts, grouping=grouping, refusals=choice.refusals, module=module, graph=draft.graph,
        plan=Plan(cut, draft.plans), verdict=verify.compare(captured, module), seconds=0.0,
    )  # fmt: skip
