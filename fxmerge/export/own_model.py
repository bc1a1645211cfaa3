"""The merged model in the class that the user gave, with its own methods, modes and wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.export.check import Expected
from fxmerge.export.class_fit import Stopped, fitted
from fxmerge.export.folded import sources
from fxmerge.export.left_whole import left_whole
from fxmerge.export.own_class import Fit, narrowed
from fxmerge.ir.groups import survivors
from fxmerge.plan import planned
from fxmerge.report.reports import Report
from fxmerge.report.tables import first_names
from fxmerge.weights.copy import inside
from fxmerge.weights.memory_format import memory_formats


@dataclass(frozen=True)
class Own:
    """The merged model in the user's own class, or None; `fit` is what it needs besides `tensors`, or why not.

    hint: what to do instead, where there is no model and something is known to help
    """

    model: nn.Module | None
    fit: Fit
    tensors: Mapping[str, Tensor]
    hint: str = ""


def own_model(report: Report) -> Own:
    """A copy of the user's model with the merged tensors, which returns what the merged model does."""
    captured, module = report.captured, report.module
    fit, tensors, stopped = fit_of(report, _own_tensors(report), Expected(captured, module))
    if fit.refused or captured.model is None:
        return Own(None, fit, tensors, _hint(report, stopped))
    return Own(_wrapped(_made(captured.model, tensors, fit), captured.given), fit, tensors)


def fit_of(
    report: Report, tensors: Mapping[str, Tensor], expected: Expected
) -> tuple[Fit, dict[str, Tensor], Stopped | None]:
    """(what the user's class needs to take these tensors of the merged model, they and those it computes others from).

    If the class cannot take them, only the tensors themselves, and where its code stopped.
    """
    captured, module, grouping = report.captured, report.module, report.grouping
    if report.plan.branches:
        some = first_names(report.plan.branches)
        why = f"the code of {captured.name} runs the branches that were dropped: {some}"
        return Fit(refused=why), {**tensors}, None
    alive = survivors(grouping, planned(grouping.everything, report.plan))
    more = sources(captured, tensors, report.facts.params, alive)
    fit, stopped = fitted(
        captured, module, report.facts, alive, tensors,
        expected=expected, sources=more, formats=memory_formats(module),
    )  # fmt: skip
    return fit, {**tensors} if fit.refused else {**tensors, **more}, stopped


def advised(report: Report) -> tuple[bool, tuple[str, ...]]:
    """Whether the user's class takes the merged tensors; if not, patterns of groups to leave whole, if any help."""
    taken, stopped = _taken(report)
    return taken, () if taken else left_whole(report, stopped, _taken)


def _taken(report: Report) -> tuple[bool, Stopped | None]:
    fit, _, stopped = fit_of(report, _own_tensors(report), Expected(report.captured, report.module))
    return not fit.refused, stopped


def _hint(report: Report, stopped: Stopped | None) -> str:
    """What to give a merge instead, so that there is a model of the user's class; "" if nothing is known."""
    options, captured = report.plan.options, report.captured
    if captured.model is None or isinstance(captured.model, fx.GraphModule):
        return ""
    there = {name for name, _ in captured.model.named_parameters(remove_duplicate=False)}
    if any(name not in there and name.removesuffix("_bias") in there for name in _own_tensors(report)):
        return "; with own_class=True, layers whose class has no place for a bias get none"
    uneven = bool(options.budget) and not options.same_widths
    even = "; with same_widths=True, layers of one kind share a width" if uneven else ""
    patterns = left_whole(report, stopped, _taken)
    keep = ", ".join(f'"{pattern}": 1.0' for pattern in patterns)
    found = f"; there is one with keep={{{keep}}}, which leaves these groups whole, or with own_class=True"
    return even + (found if patterns else "")


def into(other: nn.Module, report: Report, own: Own) -> nn.Module:
    """A copy of another model of the user's class with the merged tensors, in the modes and the wrapper of `other`.

    Raises FxMergeError if the class cannot take them, or if the model is not of that class.
    """
    plain, captured = inside(other), report.captured
    if own.fit.refused:
        raise FxMergeError(
            f"the merged weights cannot be put into {type(plain).__name__}: {own.fit.refused}; use result.module, or "
            "exclude the layer with ignore= when merging"
        )
    if type(plain) is not type(captured.model):
        raise FxMergeError(f"the model is a {type(plain).__name__}; give a {captured.name}, the class that was merged")
    return _wrapped(_made(plain, own.tensors, own.fit), other)


def _made(model: nn.Module, tensors: Mapping[str, Tensor], fit: Fit) -> nn.Module:
    """The copy, in the modes of the model."""
    made = narrowed(model, tensors, fit)
    modes = {path: m.training for path, m in model.named_modules(remove_duplicate=False)}
    for path, part in made.named_modules(remove_duplicate=False):
        part.training = modes.get(path, part.training)
    return made


def _own_tensors(report: Report) -> dict[str, Tensor]:
    """The merged tensors; biases that refit gave to function calls have the names of those that layers do not have."""
    tensors, model = report.module.state_dict(), report.captured.model
    modules = dict(model.named_modules(remove_duplicate=False)) if model is not None else {}

    def renamed(name: str) -> str:
        path, _, last = name.rpartition(".")
        free = path in modules and "bias" in modules[path]._parameters and modules[path]._parameters["bias"] is None
        return f"{path}.bias" if last == "weight_bias" and free else name

    return {renamed(name): value for name, value in tensors.items()}


def _wrapped(model: nn.Module, given: nn.Module | None) -> nn.Module:
    """The model in the wrappers that the user's model was in: torch.compile, DataParallel, DistributedDataParallel."""
    if given is None or inside(given) is given:
        return model
    if isinstance(given, nn.DataParallel):
        where = {name: vars(given)[name] for name in ("device_ids", "output_device", "dim") if name in vars(given)}
        return nn.DataParallel(_wrapped(model, given.module), **where)
    if isinstance(given, nn.parallel.DistributedDataParallel):
        inner = _wrapped(model, given.module)
        return nn.parallel.DistributedDataParallel(
            inner, given.device_ids, given.output_device, given.dim, process_group=given.process_group
        )
    return type(given)(_wrapped(model, given._modules["_orig_mod"]), given.dynamo_ctx)  # torch.compile's
