"""Save a merged model as a folder, and load such a folder. No pickle is involved.

model.py             plain torch.nn code with `class MergedModel` and `load()`, if the graph can be written as such code
weights.safetensors  its tensors by name; the metadata has the format's version, checksums, and how to load the tensors
                     into a model of the user's own class
plan.json            the plan: the options and the kept channels of each group
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
from fxmerge.export.check import Expected
from fxmerge.export.own_class import Fit, narrowed
from fxmerge.export.own_model import fit_of
from fxmerge.export.source.layers import layered
from fxmerge.export.source.module import source
from fxmerge.ir.capture import Capture
from fxmerge.plan import Plan
from fxmerge.report.reports import Report
from fxmerge.weights.by_path import at
from fxmerge.weights.file_regions import open_tensors, regions
from fxmerge.weights.files import write_folder, write_tensors, write_text
from fxmerge.weights.stored_tensor import has_stored_tensors, raw

VERSION = 1
MODEL, WEIGHTS, PLAN = "model.py", "weights.safetensors", "plan.json"
REPORTS = {"report.txt": Report.text, "report.json": Report.json, "report.html": Report.html}
_FILES = (".onnx", ".pt2", ".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_KEY = "fxmerge_folder"


def save(folder: Path, report: Report) -> None:
    """Write the folder of a merge. The write is atomic: if it fails, an existing folder is unchanged.

    Raises FxMergeError if the folder holds other files, if its path is that of a file or looks like one, and if the
    loaded model does not return what the merged model does.
    """
    if folder.suffix.lower() in _FILES and not folder.is_dir():
        raise FxMergeError(
            f"{folder} looks like a file, and result.save writes a folder; give a folder's name, or write a file with "
            "result.to_onnx or result.save_program"
        )
    captured, module, plan = report.captured, report.module, report.plan
    expected = Expected(captured, module)
    text, tensors, why = model_source(captured, module, expected)
    fit, tensors, _ = fit_of(report, tensors, expected)
    texts = {PLAN: plan.json()} | ({MODEL: text} if text else {})
    metadata = {
        _KEY: str(VERSION),
        "no_model": why,
        "own_class": json.dumps(fit.json()),
        "tensors": digest(tensors),
        **{name: _checksum(content) for name, content in texts.items()},
    }

    def fill(there: Path) -> None:
        for name, content in texts.items():
            write_text(there / name, content)
        for name, method in REPORTS.items():
            write_text(there / name, method(report))
        write_tensors(there / WEIGHTS, tensors, metadata)
        if text:
            confirmed(there, expected, on_disk=has_stored_tensors(module))

    write_folder(folder, {MODEL, WEIGHTS, PLAN, *REPORTS}, fill)


def confirmed(folder: Path, expected: Expected, on_disk: bool) -> None:
    """Loads a folder in both ways, and raises FxMergeError if a loaded model is not the merged one."""
    module = load(folder, on_disk=on_disk)
    expected.confirm(module, "the saved and loaded model")
    if on_disk:
        return  # model.py's own load() reads all weights into memory
    space: dict[str, Any] = {"__file__": str(folder / MODEL), "__name__": "model"}
    exec(compile((folder / MODEL).read_text(encoding="utf-8"), str(folder / MODEL), "exec"), space)
    alone, held = space["load"]().state_dict(), module.state_dict()
    if alone.keys() != held.keys() or any(digest({"": alone[k]}) != digest({"": held[k]}) for k in held):
        raise FxMergeError(f"load() of {MODEL} reads other weights than were saved; please report this model")


def model_source(captured: Capture, module: nn.Module, expected: Expected) -> tuple[str, dict[str, Tensor], str]:
    """(text of model.py, its tensors, ""), or ("", the module's tensors, why there is no model.py).

    The code is run and must reproduce the module's outputs.
    """
    tensors: dict[str, Tensor] = module.state_dict()
    if not isinstance(module, fx.GraphModule):
        return "", tensors, "only parts of the model could be traced; the rest is the user's own code"
    graph, why = layered(module), ""
    for plain in (True, False):
        try:
            text = source(graph, type(captured.model).__name__, plain)
            made = _made(text, Path(MODEL), has_stored_tensors(graph))
            held = {name: at(graph, name).detach() for name in made.state_dict()}
            _load_into(made, held, has_stored_tensors(graph))
            made.to(next((v.device for v in held.values()), None))
            if expected.error(made) <= 1:
                return text, held, ""
        except FxMergeError as error:
            return "", tensors, str(error)
        except Exception as error:
            why = f"its code does not run ({error})"
        else:
            why = "its code does not reproduce the merged model's outputs"
    return "", tensors, f"{why}; please report this model"


def _load_into(module: nn.Module, tensors: Mapping[str, Tensor], assign: bool) -> None:
    """`load_state_dict`, which also raises if a tensor would be converted to another dtype."""
    for name, value in module.state_dict().items():
        if name in tensors and tensors[name].dtype != value.dtype:
            raise TypeError(f"{name} is {tensors[name].dtype}, and {value.dtype} in the code")
    module.load_state_dict(dict(tensors), assign=assign)


def load(folder: str | Path, model: nn.Module | None = None, on_disk: bool = False) -> nn.Module:
    """Load a model saved by `Result.save`, in evaluation mode. By default this executes the folder's model.py.

    model: an instance of the class that was merged. Returns a copy of it whose tensors are replaced by the merged
        ones, so that its own methods keep working; parametrized weights are plain parameters in it. Nothing in the
        folder is executed.
    on_disk: leave the weights in the folder and read them as they are needed, as `fxmerge.on_disk` does.

    Raises FxMergeError if the folder was not saved by fxmerge, is damaged or incomplete, or was saved by a newer
    version of fxmerge, and if `model` cannot take the merged weights.
    """
    folder = Path(folder)
    tensors, metadata = _read(folder, on_disk)
    Plan.from_json(_checked(folder, PLAN, metadata))
    if model is not None:
        if not isinstance(model, nn.Module):
            raise FxMergeError(f"model is a {type(model).__name__}, not a torch.nn.Module; pass an instance")
        fit = _own_class(metadata, folder)
        if fit.refused:
            raise FxMergeError(
                f"the weights in {folder} cannot be loaded into the user's own class: {fit.refused}; call load(folder) "
                "without model=, or exclude the layer with ignore= when merging"
            )
        return narrowed(model, tensors, fit).eval()
    if MODEL not in metadata:
        why = metadata.get("no_model", "")
        raise FxMergeError(f"{folder} has no {MODEL}: {why}; call load(folder, model=your_model)")
    try:
        module = _made(_checked(folder, MODEL, metadata), folder / MODEL, on_disk)
        only_own = _own_class(metadata, folder).sources
        _load_into(module, {k: v for k, v in tensors.items() if k not in only_own}, on_disk)
    except FxMergeError:
        raise
    except Exception as error:
        raise FxMergeError(f"{folder / MODEL} cannot be run: {type(error).__name__}: {error}") from error
    return module.eval()


def _made(text: str, path: Path, empty: bool) -> nn.Module:
    """The model of a generated model.py.

    empty: create it on the meta device, without memory for its weights, which are assigned later
    """
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    with torch.device("meta") if empty else nullcontext():
        made = module.MergedModel()
    assert isinstance(made, nn.Module)
    return made


def _read(folder: Path, on_disk: bool) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """(tensors, metadata) of a folder's weights file, after checks."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise FxMergeError(f"{folder} is not a folder saved by fxmerge: it has no {WEIGHTS}")
    try:
        # for torch, the whole file is mapped as memory that may be written
        with safe_open(path, framework="np" if on_disk else "pt") as opened:
            metadata = opened.metadata() or {}
            names = [] if on_disk else opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise FxMergeError(f"{path} is damaged: {error}") from error
    tensors = open_tensors(regions(path)) if on_disk else tensors
    version = metadata.get(_KEY, "")
    if not version.isdecimal():
        raise FxMergeError(f"{path} was not saved by fxmerge; load it with safetensors")
    if int(version) > VERSION:
        raise FxMergeError(
            f"{folder} has format version {version}, but this fxmerge reads version {VERSION}; update fxmerge"
        )
    if digest(tensors) != metadata.get("tensors"):
        raise FxMergeError(f"{path} is damaged: its tensors differ from the saved ones; save the model again")
    return tensors, metadata


def _checked(folder: Path, name: str, metadata: Mapping[str, str]) -> str:
    """The text of a file in the folder. Raises FxMergeError if it differs from the saved text."""
    try:
        text = (folder / name).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FxMergeError(f"{folder / name} cannot be read: {error}") from error
    if _checksum(text) != metadata.get(name):
        raise FxMergeError(
            f"{folder / name} is not the file that was saved with {WEIGHTS}: it is damaged, edited or from another "
            f"folder; to load an edited {MODEL}, call its own load()"
        )
    return text


def _own_class(metadata: Mapping[str, str], folder: Path) -> Fit:
    """The record about the user's own class."""
    try:
        return Fit.from_json(json.loads(metadata.get("own_class", "")))
    except json.JSONDecodeError as error:
        raise FxMergeError(f"{folder / WEIGHTS} is damaged: {error}") from error


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(memoryview(raw(value)))
    return digest.hexdigest()
