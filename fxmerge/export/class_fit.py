"""Finds by trial what a model of the user's own class needs to take the merged tensors (`own_class.Fit`).

The code of the class reads widths from integer attributes, and the merged graph shows which literals changed in which
submodule: attributes of that submodule with the old value are candidates, for all layers of a class alike. The search
starts with none of them. While the code raises, those of the modules in which it raised are tried, alone and in pairs,
and what lets the most calls succeed is kept; a choice is accepted if the outputs on the example inputs are those of the
merged model. Then the attributes are left out that are not needed: an attribute with the same number may be a limit on
the length.

If the code takes the scale of an attention from the width of the heads, or leaves it to torch, narrower heads change
the scale from 1/sqrt(d) to 1/sqrt(d_new). The rows that produce the queries are multiplied by sqrt(d_new / d) to
compensate.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxmerge.errors import FxMergeError, of_user
from fxmerge.export import query_rows
from fxmerge.export.check import Expected
from fxmerge.export.class_numbers import (
    Kind,
    Numbers,
    by_graph,
    by_tensors,
    counted,
    has_size,
    is_width,
    value_at,
)
from fxmerge.export.folded import computed, plain_copy, recomputed
from fxmerge.export.own_class import Fit, narrowed
from fxmerge.export.query_rows import Rows
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance

TRIALS = 300  # runs of the class, at most


def fitted(
    captured: Capture, merged: nn.Module, facts: Provenance, alive: Tensor, tensors: Mapping[str, Tensor],
    *, expected: Expected, sources: Mapping[str, Tensor], formats: Mapping[str, str],
) -> tuple[Fit, Stopped | None]:  # fmt: skip
    """What the user's class needs in addition to the merged tensors; `refused` is set if it cannot take them.

    Then also where its code stopped in the attempt that came furthest, if it raised there.

    tensors: the merged model's
    sources: those that the class needs besides (see `folded.sources`)
    """
    model = captured.model
    if model is None or isinstance(model, fx.GraphModule):
        return Fit(refused="the model that was merged was a graph, which has no class of its own"), None
    given = {**tensors, **sources}
    graph = merged if isinstance(merged, fx.GraphModule) else None
    common: Any = {
        "unused": tuple(sorted(set(plain_copy(model).state_dict()) - set(given))),
        "sources": tuple(sources),
        "computed": tuple(computed(captured)),
        "formats": formats,
    }
    fewer = dict(counted(merged, model))
    scales: list[Rows] = [{}]
    if graph is not None:
        scales += [query_rows.without_scale(captured, graph, facts, alive), query_rows.of_all_products(facts, alive)]
    fits = [Fit(attributes=fewer, rows=rows, **common) for i, rows in enumerate(scales) if rows or not i]
    trials = _Trials(model, given, fits, expected)
    numbers = by_graph(captured, graph, model) if graph else {}
    try:
        found = _searched(trials, {**trials.by_tensors(), **trials.open(numbers)})
    except FxMergeError as error:
        return Fit(refused=str(error)), None
    if found is not None:
        attributes, rows = found
        return Fit(attributes={**fewer, **attributes}, rows=rows, **common), None
    stopped, why = trials.furthest.stopped, "its outputs on the example inputs differ"
    from_own = [
        names
        for names in recomputed(captured, tensors).values()
        if stopped is None or type(model.get_submodule(names[0].rpartition(".")[0])) in stopped.owners[:1]
    ]
    if from_own:
        names = ", ".join(from_own[0])
        why = f"it computes a tensor from {names} at each use, which is no longer that of the merged model"
        return Fit(refused=f"the code of {type(model).__name__} cannot take them: {why}"), None
    if stopped is not None:
        why = f"its code does not run on the narrower tensors ({stopped.error} at {stopped.line})"
    why = f"the code of {type(model).__name__} has sizes that cannot be changed from outside: {why}"
    return Fit(refused=why), stopped


@dataclass(frozen=True)
class Stopped:
    """Where the code of a class raised.

    calls:   the calls of torch that succeeded before
    owners:  the classes of the modules in which it raised, innermost first
    line:    of the innermost of them, as `net.py:12, in Net.forward`
    error:   the type of the exception
    """

    calls: int
    owners: tuple[type, ...]
    line: str
    error: str


@dataclass(frozen=True)
class _Outcome:
    """How a run of the class went.

    fits:     the rows to scale, where its outputs are those of the merged model; otherwise None
    calls:    the calls of torch that succeeded
    stopped:  where it raised; None if it did not
    """

    fits: Rows | None
    calls: int
    stopped: Stopped | None = None


class _Trials:
    """Runs copies of the user's model that have the merged tensors, one copy for each choice of scaled rows."""

    def __init__(self, model: nn.Module, given: Mapping[str, Tensor], fits: Sequence[Fit], expected: Expected) -> None:
        self.model, self.given, self.fits, self.expected = model, given, fits, expected
        self.copies: dict[int, nn.Module] = {}
        self.left, self.furthest = TRIALS, _Outcome(None, -1)

    def copy(self, number: int) -> nn.Module:
        """Raises FxMergeError if the class cannot hold the tensors."""
        if number not in self.copies:
            self.copies[number] = narrowed(self.model, self.given, self.fits[number])
        return self.copies[number]

    def open(self, numbers: Numbers) -> Numbers:
        """Those of the attributes that did not follow from the tensors."""
        before, after = self.model, self.copy(0)
        found: dict[Kind, list[Mapping[str, int]]] = {}
        for kind, choices in numbers.items():
            for choice in choices:
                kept = {path: n for path, n in choice.items() if value_at(before, path) == value_at(after, path)}
                still = {path: n for path, n in kept.items() if not has_size(after, path)}
                for some in (kept, still):
                    if some and some not in found.setdefault(kind, []):
                        found[kind].append(some)
        return {kind: choices for kind, choices in found.items() if choices}

    def by_tensors(self) -> Numbers:
        """The attributes that are named as widths: the code may only compare them with the width of its input."""
        return {kind: [choice] for kind, choice in by_tensors(self.model, self.copy(0))}

    def run(self, attributes: Mapping[str, int]) -> _Outcome:
        """Runs the class with these attributes."""
        self.left -= 1
        calls, stopped = 0, None
        for number, fit in enumerate(self.fits):
            own, counter = self.copy(number), _Counter()
            try:
                with _given(own, attributes), counter:
                    if self.expected.error(own, calls=1) <= 1 and self.expected.error(own) <= 1:
                        return _Outcome(fit.rows, counter.calls)
            except Exception as error:  # the user's code may raise anything on sizes that it was not written for
                stopped = _stopped(error, counter.calls)
            calls = max(calls, counter.calls)
            if stopped is not None:
                break  # it would raise with other values too
        outcome = _Outcome(None, calls, stopped)
        self.furthest = max(self.furthest, outcome, key=lambda run: run.calls)
        return outcome


class _Counter(TorchFunctionMode):
    """Counts the calls of torch that returned."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls += 1
        return made


@contextlib.contextmanager
def _given(module: nn.Module, attributes: Mapping[str, int]) -> Iterator[None]:
    """Sets attributes of a module's submodules, and restores them."""
    places = [(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in attributes]
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), number in zip(places, attributes.values(), strict=True):
        setattr(owner, name, number)
    try:
        yield
    finally:
        for (owner, name), number in zip(places, before, strict=True):
            setattr(owner, name, number)


Chosen = Mapping[Kind, Mapping[str, int]]


def _searched(trials: _Trials, numbers: Numbers) -> tuple[dict[str, int], Rows] | None:
    """(the attributes to set, the rows to scale), or None."""
    chosen: Chosen = {}
    best = trials.run({})
    while best.fits is None and trials.left > 0:
        step = _step(trials, numbers, chosen, best)
        if step is None:
            break
        chosen, best = step
    if best.fits is None:  # all of them: the code may fail far from where it took a wrong number
        chosen = {kind: choices[0] for kind, choices in numbers.items()}
        best = trials.run(_flat(chosen))
    if best.fits is None:
        return None
    for kind in list(chosen):
        fewer = {k: v for k, v in chosen.items() if k != kind}
        if (outcome := trials.run(_flat(fewer))).fits is not None:
            chosen, best = fewer, outcome
    unread = {k: c[0] for k, c in numbers.items() if len(c) == 1 and is_width(k[1])}
    unread = {kind: choice for kind, choice in unread.items() if kind not in chosen}
    for some in [unread, *({kind: choice} for kind, choice in unread.items())] if unread else []:
        more = {**chosen, **some}  # not read now, but perhaps by other methods
        if (outcome := trials.run(_flat(more))).fits is not None:
            chosen, best = more, outcome
            if some is unread:
                break
    assert best.fits is not None
    return _flat(chosen), best.fits


def _step(trials: _Trials, numbers: Numbers, chosen: Chosen, best: _Outcome) -> tuple[Chosen, _Outcome] | None:
    """One more attribute, or two, with which the code comes further than before, and how far."""
    kinds = list(numbers)
    if best.stopped is not None:
        order = {owner: i for i, owner in reversed(list(enumerate(best.stopped.owners)))}
        kinds = sorted((k for k in numbers if k[0] in order), key=lambda k: order[k[0]])
    single = [(kind, choice) for kind in kinds for choice in numbers[kind] if chosen.get(kind) != choice]
    for size in (1, 2):
        found: tuple[Chosen, _Outcome] | None = None
        for move in itertools.combinations(single, size):
            if trials.left <= 0:
                break
            tried = {**chosen, **dict(move)}
            if len({kind for kind, _ in move}) < size:  # two numbers for one attribute
                continue
            outcome = trials.run(_flat(tried))
            if outcome.fits is not None:
                return tried, outcome
            further = outcome.calls > (found[1] if found else best).calls
            if best.stopped is not None and (further or (outcome.stopped is None and found is None)):
                found = tried, outcome
        if found:
            return found
    return None


def _flat(chosen: Chosen) -> dict[str, int]:
    return {path: number for choice in chosen.values() for path, number in choice.items()}


def _stopped(error: Exception, calls: int) -> Stopped:
    """Where an exception was raised: the innermost method of a module that is not one of torch's own."""
    owners: list[type] = []
    line, trace = "its own code", error.__traceback__
    while trace is not None:
        code, owner = trace.tb_frame.f_code, trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            owners.append(type(owner))
            if of_user(code.co_filename):
                line = f"{code.co_filename}:{trace.tb_lineno}, in {type(owner).__name__}.{code.co_name}"
        trace = trace.tb_next
    return Stopped(calls, tuple(dict.fromkeys(reversed(owners))), line, type(error).__name__)
