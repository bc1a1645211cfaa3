"""The functions that users call: analyze, merge, apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from fxmerge.analysis.grouping import grouped
from fxmerge.analysis.propagate import provenance
from fxmerge.capture.capture_model import capture
from fxmerge.errors import FxMergeError
from fxmerge.options import Options
from fxmerge.pipeline import prepared
from fxmerge.plan import GroupPlan, Plan
from fxmerge.progress import older_left_alone, progress
from fxmerge.result import Analysis, Result

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def analyze(
    model: nn.Module | ExportedProgram, example_inputs: Any = None, options: Options | None = None, **changes: Any
) -> Analysis:
    """Find a model's merge groups and refusals; nothing is changed.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; an ExportedProgram has
        its own.
    Raises FxMergeError for a model that cannot be traced or inputs that it does not take.
    """
    options = settled(options, changes)
    with older_left_alone():
        captured = capture(model, example_inputs)
        facts, grouping = grouped(captured, provenance(captured, options.heads != "width"), options.heads)
    return Analysis(captured, facts, grouping, grouping.refusals)


def settled(options: Options | None, changes: dict[str, Any]) -> Options:
    if options is not None and not isinstance(options, Options):
        raise FxMergeError(f"options is a {type(options).__name__}; give fxmerge.Options(...) or keyword arguments")
    return (options or Options()).replace(**changes)


def merge(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    options: Options | None = None,
    calibration: Any = None,
    **changes: Any,
) -> Result:
    """Make a trained model structurally smaller; `model` itself is never modified.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; an ExportedProgram has
        its own.
    options: `Options`, or its fields as keyword arguments.
    calibration: batches of unlabelled inputs for refit, in place of probes: an iterable of tensors, tuples or dicts, a
        DataLoader (what the model does not take is ignored), or one tensor.
    Raises FxMergeError where it cannot be done, naming what and what to do instead.
    """
    return _merge(model, example_inputs, settled(options, changes), None, calibration)


def apply(
    plan: Plan, model: nn.Module | ExportedProgram, example_inputs: Any = None, calibration: Any = None
) -> Result:
    """Replay a plan on another copy of the model: the same channels stay, whatever the weights.

    Raises FxMergeError where the model's groups are not the plan's.
    """
    return _merge(model, example_inputs, plan.options, {g.name: g for g in plan.groups}, calibration)


def _merge(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    options: Options,
    decided: Mapping[str, GroupPlan] | None,
    given: Any,
) -> Result:
    with progress() as stage, older_left_alone():
        return prepared(model, example_inputs, options, given, stage).merged(options, decided)
