"""Specs, by which the command line names a model, such as `torchvision:resnet18` or `path/to/file.py:factory`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxmerge.cli import published
from fxmerge.errors import FxMergeError
from fxmerge.export import program, save
from fxmerge.weights import on_disk as stored_models
from fxmerge.weights.unreadable import unreadable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_FORMS = (
    "torchvision:resnet18, timm:NAME, package.module:factory, path/to/file.py:factory, a .pt2 file or a saved folder"
)


@dataclass(frozen=True)
class Source:
    """A model as the command line names it, and what is known about its inputs.

    spec:       the words that name it
    inputs:     `example_inputs` of the file or module of the model, or None
    transform:  the model's preprocessing of a PIL image, or None if it is not known
    random:     whether its weights are random for certain
    """

    spec: str
    model: nn.Module | ExportedProgram
    inputs: Any = None
    transform: Callable[[Any], Any] | None = None
    random: bool = False


def load(
    spec: str, weights: Path | None = None, on_disk: bool = False, pretrained: bool = False, dtype: str | None = None
) -> Source:
    """The model of a spec, in evaluation mode. `example_inputs` of its file or module, a value or a function, are its
    inputs.

    weights: a safetensors file with the model's state_dict
    on_disk: read the weights from the file only when needed (see `fxmerge.on_disk`)
    pretrained: with the published weights of torchvision or timm
    dtype: of the weights; by default, as they are
    Raises FxMergeError for a spec, a factory or a weights file that cannot be used, naming it.
    """
    stored = spec.endswith(".pt2") or Path(spec).is_dir()
    if stored and (weights is not None or pretrained):
        raise FxMergeError(f"{spec} includes its weights; leave out {'--pretrained' if pretrained else '--weights'}")
    if on_disk and spec.endswith(".pt2"):
        raise FxMergeError(f"torch.export can only read {spec} as a whole; leave out --on-disk")
    if dtype and (on_disk or spec.endswith(".pt2")):
        raise FxMergeError(f"--dtype: the weights of {spec} cannot be converted; leave it out")
    if pretrained and weights is not None:
        raise FxMergeError("--pretrained and --weights contradict each other; give one of them")
    if stored:
        source = Source(spec, program.load(Path(spec)) if spec.endswith(".pt2") else save.load(spec, on_disk=on_disk))
    else:
        source = _created(spec, weights, on_disk, pretrained)
    if dtype and isinstance(source.model, nn.Module):
        source = replace(source, model=source.model.to(getattr(torch, dtype)))
    return source


def _created(spec: str, weights: Path | None, on_disk: bool, pretrained: bool) -> Source:
    """The model that a factory makes, of torchvision, timm or the user's own."""
    origin, _, name = spec.rpartition(":")
    if not origin or not name:
        raise FxMergeError(f"{spec!r} does not name a model; give {_FORMS}")
    if on_disk and weights is None:
        raise FxMergeError("--on-disk needs --weights, the safetensors file, or folder of files, to read them from")
    if pretrained and origin not in published.ORIGINS:
        raise FxMergeError(f"--pretrained is for torchvision:NAME and timm:NAME; {spec} makes its own weights")
    torch.manual_seed(0)
    made = _without_memory if on_disk else _made
    inputs: Any = None
    if origin in published.ORIGINS:
        module = _imported(published.ORIGINS[origin], spec)
        model = made(spec, lambda: published.create(origin, module, name, pretrained))
        transform = published.transform(origin, module, name, model)
    else:
        module, factory = _named(spec, _FORMS)
        model = made(spec, factory)
        inputs = getattr(module, "example_inputs", None)
        inputs = inputs() if callable(inputs) else inputs
        transform = getattr(module, "transform", None)
    if weights is not None and on_disk:
        model = stored_models.on_disk(model, weights)
    elif weights is not None:
        load_weights(model, weights)
    random = origin in published.ORIGINS and not pretrained and weights is None
    return Source(spec, model.eval(), inputs, transform, random)


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
    except FxMergeError:
        raise
    except Exception as error:
        raise FxMergeError(f"the model of {spec} cannot be created: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise FxMergeError(f"{spec} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _without_memory(spec: str, factory: Any) -> nn.Module:
    with stored_models.without_memory():
        return _made(spec, factory)
