"""Specs, by which the command line names a model, such as `torchvision:resnet18` or `path/to/file.py:factory`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxmerge.errors import FxMergeError
from fxmerge.export import program, save
from fxmerge.weights import on_disk as stored_models
from fxmerge.weights.unreadable import unreadable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_FORMS = (
    "torchvision:resnet18, timm:NAME, package.module:factory, path/to/file.py:factory, a .pt2 file or a saved folder"
)


def load(
    spec: str, weights: Path | None, shape: tuple[int, ...], on_disk: bool = False
) -> tuple[nn.Module | ExportedProgram, Any]:
    """A model and example inputs for it.

    The inputs are random numbers of this shape, unless the file or module of the model has `example_inputs`, a value or
    a function.

    weights: a safetensors file with the model's state_dict
    on_disk: read the weights from the file only when needed (see `fxmerge.on_disk`)
    Raises FxMergeError for a spec, a factory or a weights file that cannot be used, naming it.
    """
    if spec.endswith(".pt2") or Path(spec).is_dir():
        if weights is not None:
            raise FxMergeError(f"{spec} includes its weights; leave out --weights")
        if on_disk and spec.endswith(".pt2"):
            raise FxMergeError(f"torch.export can only read {spec} as a whole; leave out --on-disk")
        found: Any = program.load(Path(spec)) if spec.endswith(".pt2") else save.load(spec, on_disk=on_disk)
        return found, None if isinstance(found, torch.export.ExportedProgram) else torch.randn(shape)
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise FxMergeError(f"{spec!r} does not name a model; give {_FORMS}")
    if on_disk and weights is None:
        raise FxMergeError("--on-disk needs --weights, the safetensors file, or folder of files, to read them from")
    torch.manual_seed(0)
    made = _without_memory if on_disk else _made
    if source == "torchvision":
        module = _imported("torchvision.models", spec)
        model = made(spec, lambda: module.get_model(name, weights=None))
        inputs: Any = None
    elif source == "timm":
        module = _imported("timm", spec)
        model = made(spec, lambda: module.create_model(name, pretrained=False))
        inputs = None
    else:
        module, factory = _named(spec, _FORMS)
        model = made(spec, factory)
        inputs = getattr(module, "example_inputs", None)
        inputs = inputs() if callable(inputs) else inputs
    if weights is not None and on_disk:
        model = stored_models.on_disk(model, weights)
    elif weights is not None:
        load_weights(model, weights)
    if inputs is None:
        inputs = torch.randn(shape)
    return model, inputs


def dynamic_shapes(words: Sequence[str]) -> dict[str, dict[int, Any]] | None:
    """The sizes that `--dynamic x:0,2,3 mask:0` declares to vary, as torch.export.export takes them; None for none.

    Raises FxMergeError for a word of another form.
    """
    found: dict[str, dict[int, Any]] = {}
    for word in words:
        name, _, axes = word.rpartition(":")
        if not name or not all(axis.isdecimal() for axis in axes.split(",")):
            raise FxMergeError(f"--dynamic {word}: give an input and its axes that vary, such as x:0,2,3")
        found.setdefault(name, {}).update(dict.fromkeys(map(int, axes.split(",")), torch.export.Dim.DYNAMIC))
    return found or None


def function(spec: str) -> Any:
    """The function of `package.module:function` or `path/to/file.py:function`. Raises FxMergeError if there is none."""
    if spec.count(":") < 1:
        raise FxMergeError(
            f"{spec!r} does not name a function; give package.module:function or path/to/file.py:function"
        )
    return _named(spec, "package.module:function or path/to/file.py:function")[1]


def _named(spec: str, forms: str) -> tuple[Any, Any]:
    """(the module of a spec, the callable in it that the spec names)"""
    source, _, name = spec.rpartition(":")
    module = _file(Path(source)) if source.endswith(".py") else _imported(source, spec)
    found = getattr(module, name, None)
    if not callable(found):
        raise FxMergeError(f"{source} has no callable {name!r}; give {forms}")
    return module, found


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state_dict from a safetensors file; its keys must be exactly those of the model."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise FxMergeError(f"{path} is not a state_dict of {type(model).__name__}: {error}") from error


def _imported(name: str, spec: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FxMergeError(f"{spec!r} needs the module {name}, which cannot be imported: {error}") from error


def _file(path: Path) -> Any:
    found = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or found is None or found.loader is None:
        raise FxMergeError(f"there is no file {path}")
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(path.stem, module)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise FxMergeError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _made(spec: str, factory: Any) -> nn.Module:
    try:
        model = factory()
    except Exception as error:
        raise FxMergeError(f"the model of {spec} cannot be created: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise FxMergeError(f"{spec} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _without_memory(spec: str, factory: Any) -> nn.Module:
    with stored_models.without_memory():
        return _made(spec, factory)
