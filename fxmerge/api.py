"""The main functions: analyze, merge and apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from fxmerge.analysis.grouping import grouped
from fxmerge.analysis.propagate import provenance
from fxmerge.capture.capture_model import capture
from fxmerge.depth import merged
from fxmerge.errors import FxMergeError
from fxmerge.keywords import Keywords
from fxmerge.options import Options
from fxmerge.pipeline import prepared
from fxmerge.plan import Plan
from fxmerge.planning.counted import check_of
from fxmerge.progress import older_left_alone, progress
from fxmerge.result import Analysis, Result

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from typing_extensions import Unpack


def analyze(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    options: Options | None = None,
    dynamic_shapes: Any = None,
    **changes: Unpack[Keywords],
) -> Analysis:
    """Finds a model's merge groups, and the channels that cannot be merged, without changing anything.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; may be omitted for an
        ExportedProgram that has example inputs. Give real inputs: probes are made from them, from as many as they hold.
    options: `Options`, or its fields as keyword arguments.
    dynamic_shapes: as in `merge`.
    Raises FxMergeError if the model cannot be traced or does not accept the inputs.
    """
    options = settled(options, changes)
    with older_left_alone():
        captured = capture(model, example_inputs, dynamic_shapes)
        facts, grouping = grouped(captured, provenance(captured, options.heads != "width"), options.heads)
    return Analysis(captured, facts, grouping, grouping.refusals)


def settled(options: Options | None, changes: Mapping[str, Any]) -> Options:
    """The options with changes given as keyword arguments; the default options if there are none."""
    if options is not None and not isinstance(options, Options):
        raise FxMergeError(f"options is a {type(options).__name__}; give fxmerge.Options(...) or keyword arguments")
    return (options or Options()).replace(**changes)


def merge(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    options: Options | None = None,
    calibration: Any = None,
    dynamic_shapes: Any = None,
    **changes: Unpack[Keywords],
) -> Result:
    """Makes a trained model structurally smaller. `model` itself is not modified.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; may be omitted for an
        ExportedProgram that has example inputs.
    options: `Options`, or its fields as keyword arguments.
    calibration: batches of inputs for refit, to be used instead of synthetic probes: an iterable of tensors, tuples or
        dicts, a DataLoader, or one tensor. Values that the model does not take, such as labels, are ignored.
    dynamic_shapes: the sizes of the inputs that vary, as for torch.export.export; by default, as many as can. They hold
        for the merged module if the model was captured by torch.export, and for what is exported from the result.
    Raises FxMergeError if the model cannot be merged; the message says why, and what to do instead.
    """
    return _merge(model, example_inputs, settled(options, changes), None, calibration, dynamic_shapes)


def apply(
    plan: Plan,
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    calibration: Any = None,
    dynamic_shapes: Any = None,
) -> Result:
    """Merges another copy of a model by a plan: the same channels and branches are dropped, whatever the weights.

    Raises FxMergeError if the model's groups, or its residual branches, are not those of the plan.
    """
    return _merge(model, example_inputs, plan.options, plan, calibration, dynamic_shapes)


def _merge(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    options: Options,
    plan: Plan | None,
    given: Any,
    dynamic_shapes: Any,
) -> Result:
    if options.depth and not options.budget:
        raise FxMergeError("depth=True needs a budget, which says how much is removed; give budget={'flops': 0.7}")
    check_of(options)
    with progress() as stage, older_left_alone():
        return merged(prepared(model, example_inputs, options, given, stage, dynamic_shapes), options, plan)
