"""Saving: a merged model as a folder, and a folder as a model again. No pickle.

model.py             plain torch.nn source, where the graph can be written so: `class MergedModel`, `load()`
weights.safetensors  its tensors by name; the file's metadata tells the format's version, checksums, and how a model of
                     the user's own class takes the tensors
plan.json            what was decided
report.html, report.json, report.txt
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.export.own_class import Fit, fitted, narrowed
from fxmerge.export.source.layers import layered
from fxmerge.export.source.module import source
from fxmerge.graph.compare import difference, outputs
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance
from fxmerge.plan import Plan
from fxmerge.report.reports import Report
from fxmerge.weights.by_path import at
from fxmerge.weights.disk_tensor import has_disk_tensors, open_tensors, raw, regions
from fxmerge.weights.files import write_folder, write_tensors, write_text

VERSION = 1
MODEL, WEIGHTS, PLAN = "model.py", "weights.safetensors", "plan.json"
REPORTS = {"report.txt": Report.text, "report.json": Report.json, "report.html": Report.html}
_KEY = "fxmerge_folder"


def save(
    folder: Path, captured: Capture, module: nn.Module, plan: Plan, report: Report, facts: Provenance, alive: Tensor
) -> None:
    """Write the folder, whole or not at all. Raises FxMergeError where something else is in the place."""
    text, tensors, why = written(captured, module)
    fit = fitted(captured, module, facts, alive, tensors)
    texts = {PLAN: plan.json()} | ({MODEL: text} if text else {})
    told = {
        _KEY: str(VERSION),
        "no_model": why,
        "own_class": json.dumps(fit.json()),
        "tensors": _digest(tensors),
        **{name: _of_text(one) for name, one in texts.items()},
    }

    def fill(there: Path) -> None:
        for name, one in texts.items():
            write_text(there / name, one)
        for name, tell in REPORTS.items():
            write_text(there / name, tell(report))
        write_tensors(there / WEIGHTS, tensors, told)

    write_folder(folder, {MODEL, WEIGHTS, PLAN, *REPORTS}, fill)


def written(captured: Capture, module: nn.Module) -> tuple[str, dict[str, Tensor], str]:
    """(text of model.py, its tensors, ""), or ("", the module's tensors, why there is no model.py).

    The text is run on the example inputs and must give what the module gives.
    """
    tensors: dict[str, Tensor] = module.state_dict()
    if not isinstance(module, fx.GraphModule):
        return "", tensors, "only parts of the model could be traced, the rest is the user's own code"
    expected, why = outputs(module, captured.args, captured.kwargs), ""
    graph = layered(module)
    for plain in (True, False):
        try:
            text = source(graph, type(captured.model).__name__, plain)
            made = _made(text, Path(MODEL), has_disk_tensors(graph))
        except FxMergeError as error:
            return "", tensors, str(error)
        except Exception as error:
            why = f"its code does not run ({error})"
            continue
        held = {name: at(graph, name).detach() for name in made.state_dict()}
        try:
            made.load_state_dict(held, assign=has_disk_tensors(graph))
            made.to(next((v.device for v in held.values()), None))
            given = outputs(made, captured.args, captured.kwargs)
        except Exception as error:
            why = f"its code does not run ({error})"
            continue
        if difference(expected, given) <= 1e-6:
            return text, held, ""
        why = "its code does not give the merged model's output"
    return "", tensors, f"{why}; please report this model"


def load(folder: str | Path, model: nn.Module | None = None, on_disk: bool = False) -> nn.Module:
    """The model that `Result.save` wrote, in evaluation mode; by default the folder's model.py is run.

    model: an instance of the class that was merged. A copy of it is returned with the merged weights, its tensors
        narrowed, so that its own methods go on working; nothing in the folder is executed.
    on_disk: let the weights stay in the folder, as `fxmerge.on_disk` does.
    Raises FxMergeError for a folder that is damaged, incomplete, newer than this fxmerge or none of its making.
    """
    folder = Path(folder)
    tensors, told = _read(folder, on_disk)
    Plan.from_json(_checked(folder, PLAN, told))
    if model is not None:
        if not isinstance(model, nn.Module):
            raise FxMergeError(f"model is a {type(model).__name__}, not a torch.nn.Module; give an instance")
        fit = Fit.from_json(_parsed(told.get("own_class", ""), folder))
        if fit.refused:
            raise FxMergeError(
                f"the weights in {folder} do not fit into the user's own class: {fit.refused}; use load(folder) "
                "without model=, or leave the layer out with ignore= when merging"
            )
        return narrowed(model, tensors, fit).eval()
    if MODEL not in told:
        why = told.get("no_model", "")
        raise FxMergeError(f"{folder} has no {MODEL}: {why}; give load(folder, model=your_model)")
    try:
        module = _made(_checked(folder, MODEL, told), folder / MODEL, on_disk)
        module.load_state_dict(tensors, assign=on_disk)
    except FxMergeError:
        raise
    except Exception as error:
        raise FxMergeError(f"{folder / MODEL} cannot be run: {type(error).__name__}: {error}") from error
    return module.eval()


def _made(text: str, path: Path, empty: bool) -> nn.Module:
    """The model of a generated model.py; `empty`: without memory for its weights, which are still to be assigned."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    with torch.device("meta") if empty else nullcontext():
        made = module.MergedModel()
    assert isinstance(made, nn.Module)
    return made


def _read(folder: Path, on_disk: bool) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a folder and what their file tells of it, checked."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise FxMergeError(f"{folder} is no folder that fxmerge saved: it has no {WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as opened:
            told = opened.metadata() or {}
            names = [] if on_disk else opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise FxMergeError(f"{path} is damaged: {error}") from error
    tensors = open_tensors(regions(path)) if on_disk else tensors
    version = told.get(_KEY, "")
    if not version.isdecimal():
        raise FxMergeError(f"{path} was not saved by fxmerge; load it with safetensors")
    if int(version) > VERSION:
        raise FxMergeError(f"{folder} is of version {version}, this fxmerge reads {VERSION}; update fxmerge")
    if _digest(tensors) != told.get("tensors"):
        raise FxMergeError(f"{path} is damaged: its tensors are not those that were saved; save the model again")
    return tensors, told


def _checked(folder: Path, name: str, told: Mapping[str, str]) -> str:
    """The text of a file of the folder. Raises FxMergeError where it is not the one that was saved."""
    try:
        text = (folder / name).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FxMergeError(f"{folder / name} cannot be read: {error}") from error
    if _of_text(text) != told.get(name):
        raise FxMergeError(
            f"{folder / name} is not the one that was saved with {WEIGHTS} (damaged, edited, or of another folder); "
            f"an edited {MODEL} is loaded by its own load()"
        )
    return text


def _parsed(text: str, folder: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FxMergeError(f"{folder / WEIGHTS} is damaged: {error}") from error


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors, their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(memoryview(raw(value)))
    return digest.hexdigest()
