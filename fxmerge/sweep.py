"""Merges a model at several budgets; the cost and quality of each merged model as a table and a plot.

The model is captured and analyzed once for all budgets, and refit's data is prepared once. If a folder is given, every
point is written there as soon as it is finished, and is read from there by later calls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxmerge.api import settled
from fxmerge.depth import merged
from fxmerge.errors import FxMergeError
from fxmerge.graph.measured import Evaluate, measured, name_of
from fxmerge.graph.nested import finite
from fxmerge.keywords import Budget, SweepKeywords
from fxmerge.options import Options
from fxmerge.pipeline import Prepared, prepared
from fxmerge.planning.counted import named
from fxmerge.progress import older_left_alone, progress
from fxmerge.report.group_data import original_cost
from fxmerge.report.points import VERSION, Point, Sweep
from fxmerge.weights.files import write_text

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from typing_extensions import Unpack


def sweep(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    budgets: Sequence[float],
    evaluate: Evaluate | None = None,
    kind: Budget = "flops",
    options: Options | None = None,
    calibration: Any = None,
    out: str | Path | None = None,
    dynamic_shapes: Any = None,
    **changes: Unpack[SweepKeywords],
) -> Sweep:
    """Merges a model at each budget, the largest first. `model` itself is not modified.

    budgets: shares of the original that may remain.
    kind: what the budgets are shares of: "flops", "params", "cache" or "latency".
    evaluate: a function that takes a model in evaluation mode and returns a number, such as its accuracy. Without it,
        only the error of the outputs on the example inputs is reported.
    options: `Options` without ratio and budget, or its fields as keyword arguments.
    calibration, dynamic_shapes: as in `merge`.
    out: a folder for finished points (one JSON file each, with the plan), which a later call with the same model,
        weights, inputs, options and evaluate does not compute again. sweep.json, sweep.txt and sweep.svg contain all
        points.
    A budget that cannot be met is reported as a point with the reason. Raises FxMergeError as `merge` does, if no
    budget can be met, and if `evaluate` does not return a number.
    """
    base = settled(options, changes)
    if base.budget or base.has_ratio:
        raise FxMergeError("a sweep takes its budgets as the argument budgets; leave out the options budget and ratio")
    if isinstance(budgets, (str, int, float)) or not isinstance(budgets, Sequence) or not budgets:
        raise FxMergeError(f"budgets is {budgets!r}; give a list of shares of the original, such as [0.75, 0.5, 0.25]")
    asked = [base.replace(budget={kind: share}) for share in budgets]
    asked = sorted({o.budget[kind]: o for o in asked}.values(), key=lambda o: -o.budget[kind])
    folder = Path(out) if out is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with progress() as stage, older_left_alone():
        prefix = [""]

        def shown(name: str, done: float = 0.0) -> None:
            stage(f"{prefix[0]}{name}", done)

        ready = prepared(model, example_inputs, asked[0], calibration, shown, dynamic_shapes)
        digest = _digest(ready, evaluate) if folder is not None else ""
        points = []
        for one in asked:
            ((_, share),) = one.budget.items()
            prefix[0] = f"{share:.1%} of the {named(kind, one.of)}: "
            points.append(_point(ready, one.replace(refit=ready.options.refit), evaluate, folder, digest))
        prefix[0] = "original: "
        original = _original(ready, asked[0], evaluate, folder, digest)
    found = Sweep(original, tuple(points), name_of(evaluate))
    if all(p.failed for p in points):
        raise FxMergeError(points[0].failed)
    if folder is not None:
        write_text(folder / "sweep.json", found.json())
        write_text(folder / "sweep.txt", found.text())
        found.svg(folder / "sweep.svg")
    return found


def _point(ready: Prepared, options: Options, evaluate: Evaluate | None, folder: Path | None, digest: str) -> Point:
    ((kind, share),) = options.budget.items()

    def made() -> tuple[Point, Any]:
        started = time.perf_counter()
        try:
            result = merged(ready, options)
        except FxMergeError as error:
            return Point(kind=kind, asked=share, failed=str(error), of=options.of), None
        report = result.report
        spent, after = report.spent, report.after
        point = Point(
            kind=kind,
            asked=share,
            left=spent.left if spent else 1.0,
            noise=spent.noise if spent else None,
            parameters=after.parameters,
            flops=after.flops,
            error=report.verdict.error,
            value=measured(evaluate, result.module),
            widths={g.name: len(g.kept) for g in result.plan.groups},
            notes=(*report.notes, *([report.verdict.reason] if report.verdict.reason else [])),
            seconds=time.perf_counter() - started,
            of=options.of,
        )
        return point, json.loads(result.plan.json())

    return _kept(made, folder, f"{kind}-{share:g}", f"{digest} {options}")


def _original(ready: Prepared, options: Options, evaluate: Evaluate | None, folder: Path | None, digest: str) -> Point:
    ((kind, _),) = options.budget.items()

    def made() -> tuple[Point, Any]:
        before = original_cost(ready.captured)
        point = Point(
            kind=kind,
            asked=1.0,
            left=1.0,
            parameters=before.parameters,
            flops=before.flops,
            error=0.0,
            value=measured(evaluate, ready.original),
            of=options.of,
        )
        return point, None

    return _kept(made, folder, f"{kind}-original", f"{digest} {options.of}" if options.of else digest)


def _kept(made: Callable[[], tuple[Point, Any]], folder: Path | None, name: str, digest: str) -> Point:
    """The point in the folder's file, if it has this digest; otherwise a new one, which is written there."""
    if folder is None:
        return made()[0]
    path, digest = folder / f"{name}.json", hashlib.sha256(digest.encode()).hexdigest()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["fxmerge_point"] == VERSION and known["digest"] == digest:
            given = known["point"]
            numbers = {f: math.nan for f in ("left", "error") if given[f] is None}
            return Point(**{**given, **numbers, "notes": tuple(given["notes"]), "of": tuple(given.get("of", ()))})
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the file is missing or of another format
    point, plan = made()
    if not point.failed:
        data = {"fxmerge_point": VERSION, "digest": digest, "point": finite(dataclasses.asdict(point)), "plan": plan}
        write_text(path, json.dumps(data, indent=1))
    return point


def _digest(ready: Prepared, evaluate: Evaluate | None) -> str:
    """Everything that a point depends on apart from its options: the code, weights, inputs, batches and `evaluate`."""
    found = hashlib.sha256()
    tensors: list[Any] = [ready.captured.inputs, [v for _, v in sorted(ready.tensors.items())]]
    if ready.options.refit == "calibration":
        tensors.append(ready.data.batches)
    for leaf in tree_leaves(tensors):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    code = f"{ready.captured.module.code} {sorted(ready.tensors)}"
    named = "" if evaluate is None else f"{getattr(evaluate, '__module__', '')}.{getattr(evaluate, '__qualname__', '')}"
    return f"{found.hexdigest()} {code} {named} {VERSION}"
