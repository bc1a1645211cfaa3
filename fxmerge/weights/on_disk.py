"""Models whose weights stay on disk while they are analysed, merged, run and saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fxmerge.errors import FxMergeError
from fxmerge.weights.by_path import Weights
from fxmerge.weights.copy import deep_copy
from fxmerge.weights.file_regions import FileRegion, open_tensors, regions
from fxmerge.weights.shards import undivided
from fxmerge.weights.stored_tensor import StoredTensor

INDEX = "model.safetensors.index.json"


def on_disk(model: nn.Module | Callable[[], nn.Module], weights: str | Path | Sequence[str | Path]) -> nn.Module:
    """A copy of a model whose weights stay in safetensors files and are read when an op needs them.

    Tensors smaller than 64 KiB are read at once. Merged weights are written to the folder for temporary files (TMPDIR),
    from which `result.save` copies them.

    model: a model with any weights, or on the meta device, where it takes no memory; or a function that makes a model,
        which is called such that parameters take no memory
    weights: the state_dict, as a file, several files, or a folder (with or without model.safetensors.index.json)

    Raises FxMergeError where the files do not match the model, or cannot be read.
    """
    if not isinstance(model, nn.Module) and callable(model):
        with without_memory():
            model = model()
    if not isinstance(model, nn.Module):
        raise FxMergeError(f"model is a {type(model).__name__}; give a torch.nn.Module, or a function that makes one")
    found = _regions(weights)
    held = [*model.parameters(), *model.buffers()]
    copied = deep_copy(model, held)
    into = Weights(copied)
    filled = _filled(copied, found, weights)
    for path, value in open_tensors(filled, {path: into[path].dtype for path in filled}).items():
        into.put(path, value)
    bare = [name for name, value in [*copied.named_parameters(), *copied.named_buffers()] if value.is_meta]
    if bare:
        raise FxMergeError(
            f"{bare[0]} is in none of the files and has no value, as the model is on the meta device; give a function "
            "that makes the model, or make the model on the CPU"
        )
    return copied


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made in this context have their parameters on the meta device; their buffers have values."""

    def bare(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        return None if value is None or value.is_meta else nn.Parameter(value.detach().to("meta"), value.requires_grad)

    hook = register_module_parameter_registration_hook(bare)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def in_memory(module: nn.Module) -> nn.Module:
    """A copy of a module with all of its weights in memory.

    Each process gets a whole copy of a module that fully_shard divided; all processes must call this.
    """
    copied = deep_copy(undivided(module)[0], [])
    into = Weights(copied)
    for path, value in [*copied.named_parameters(), *copied.named_buffers()]:
        if isinstance(value, StoredTensor):
            into.replace(path, value.backing.read().clone())
    return copied


def _filled(model: nn.Module, found: Mapping[str, FileRegion], weights: object) -> dict[str, FileRegion]:
    """The region of each tensor of the state_dict, by path; a shared tensor is listed once.

    Raises FxMergeError where names or shapes differ.
    """
    own = {name: v for name, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    names: dict[int, list[str]] = {}
    for name, value in own.items():
        names.setdefault(id(value), []).append(name)
    strange = sorted(set(found) - set(own))
    filled = {}
    for same in names.values():
        here = [name for name in same if name in found]
        if not here or strange:
            what = f"has no {same[0]}" if not here else f"has {strange[0]}, which the model does not have"
            raise FxMergeError(f"{weights} is not a state_dict of {type(model).__name__}: it {what}")
        region, shape = found[here[0]], tuple(own[here[0]].shape)
        if region.shape != shape:
            raise FxMergeError(f"{here[0]} is {region.shape} in {region.path} and {shape} in {type(model).__name__}")
        filled[here[0]] = region
    return filled


def _regions(weights: str | Path | Sequence[str | Path]) -> dict[str, FileRegion]:
    """The region of each tensor, by name, over all files."""
    paths = _files(Path(weights)) if isinstance(weights, (str, Path)) else [Path(p) for p in weights]
    found: dict[str, FileRegion] = {}
    for path in paths:
        for name, region in regions(path).items():
            if name in found:
                raise FxMergeError(f"{name} is in {found[name].path} and in {path}; leave one of them out")
            found[name] = region
    return found


def _files(path: Path) -> list[Path]:
    """The safetensors files that a path stands for: a file, an index, or a folder."""
    index = path / INDEX if path.is_dir() else path
    if index.suffix == ".json":
        try:
            return sorted({index.parent / name for name in json.loads(index.read_text())["weight_map"].values()})
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FxMergeError(f"{index} is not an index of safetensors files: {error!r}") from error
    if path.is_dir():
        paths = sorted(path.glob("*.safetensors"))
        if not paths:
            raise FxMergeError(f"there is no .safetensors file in {path}")
        return paths
    if not path.is_file():
        raise FxMergeError(f"{path} does not exist")
    return [path]
