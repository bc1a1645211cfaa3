"""Example inputs and calibration data of the command line: random numbers, token ids, arrays and images.

Arrays are read from .npz, .npy and .safetensors files. Images go through the preprocessing of the model (`Source`).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxmerge.cli.specs import Source
from fxmerge.errors import FxMergeError
from fxmerge.weights.unreadable import unreadable

Dtype = Literal["float32", "float16", "bfloat16", "float64"]
ARRAYS = (".npz", ".npy", ".safetensors")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
EXAMPLES = 64  # images that are read as example inputs, at most; samples in a batch of calibration data
SHAPE, SEQUENCE = (1, 3, 224, 224), (1, 128)


def example_inputs(source: Source, path: Path | None, shape: Sequence[int], ids: bool, dtype: Dtype | None) -> Any:
    """The example inputs of a model: from a file, from the model's own module, or random numbers of a shape.

    ids: random token ids, below the size of the model's vocabulary
    dtype: of floating-point inputs; by default, the model's
    Raises FxMergeError for a file that cannot be read, and for requests that contradict each other.
    """
    asked = [name for name, given in (("--inputs", path), ("--shape", shape), ("--ids", ids)) if given]
    if path is not None and len(asked) > 1:
        raise FxMergeError(f"{' and '.join(asked)} contradict each other; give one of them")
    if path is not None:
        found = _checked(_batch(path, _files(path, EXAMPLES), source), source, path)
    elif ids:
        found = torch.randint(_vocabulary(source), tuple(shape) or SEQUENCE)
    elif source.inputs is not None and not shape:
        found = source.inputs
    elif isinstance(source.model, nn.Module):
        found = torch.randn(tuple(shape) or SHAPE)
    else:
        return None  # an exported program has example inputs
    wanted = getattr(torch, dtype) if dtype else _dtype(source.model) if path is not None or shape else None
    return tree_map_only(Tensor, lambda t: t.to(wanted) if wanted and t.is_floating_point() else t, found)


def calibration(path: Path | None, source: Source) -> Iterator[Any] | None:
    """Batches of unlabelled samples: of a file of arrays, of a folder of such files, or of images in any order.

    None for no path. Raises FxMergeError at once if there is nothing to read.
    """
    if path is None:
        return None
    files = _files(path)
    if files[0].suffix.lower() not in ARRAYS:
        _check_transform(source, path)
    return _batches(path, files, source)


def _batches(path: Path, files: Sequence[Path], source: Source) -> Iterator[Any]:
    step = 1 if files[0].suffix.lower() in ARRAYS else EXAMPLES
    for at in range(0, len(files), step):
        batch = _batch(path, files[at : at + step], source)
        sizes = {len(t) if t.dim() else 0 for t in batch.values()}
        whole = sizes.pop() if len(sizes) == 1 else 0
        for first in range(0, max(whole, 1), EXAMPLES):
            part = {name: t[first : first + EXAMPLES] if whole else t for name, t in batch.items()}
            yield _arguments(part)


def _files(path: Path, most: int | None = None) -> list[Path]:
    """The file, or the files of a folder and of those in it, in an order that is random but always the same."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FxMergeError(f"there is no file or folder {path}")
    known = {kind: sorted(p for p in path.rglob("*") if p.suffix.lower() in kind) for kind in (ARRAYS, IMAGES)}
    found = known[ARRAYS] or known[IMAGES]
    if not found:
        raise FxMergeError(f"{path} holds no images and no files of arrays ({', '.join(ARRAYS)})")
    if known[ARRAYS] and known[IMAGES]:
        raise FxMergeError(f"{path} holds both images and files of arrays; give a folder of one kind")
    if not known[ARRAYS]:
        random.Random(0).shuffle(found)  # folders of classes, one after another, are no sample
    return found[:most] if known[IMAGES] else found


def _batch(path: Path, files: Sequence[Path], source: Source) -> dict[str, Tensor]:
    """The arrays of one file by name, or a batch of images."""
    if files[0].suffix.lower() in ARRAYS:
        if len(files) > 1:
            raise FxMergeError(f"{path} holds {len(files)} files of arrays; give one of them as example inputs")
        return _arrays(files[0])
    transform = _check_transform(source, path)
    from PIL import Image

    images = []
    for file in files:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise FxMergeError(f"{file} is neither an image nor a file of arrays ({', '.join(ARRAYS)})") from error
        images.append(transform(image))
    if len({tuple(i.shape) if isinstance(i, Tensor) else type(i) for i in images}) > 1:
        raise FxMergeError(f"the preprocessing of {source.spec} makes images of different shapes; give one shape")
    if not isinstance(images[0], Tensor):
        raise FxMergeError(f"transform of {source.spec} returns a {type(images[0]).__name__}, not a tensor")
    return {"arr_0": torch.stack(images)}


def _check_transform(source: Source, path: Path) -> Any:
    if source.transform is None:
        raise FxMergeError(
            f"{path}: images need the preprocessing that the model was trained with; write a function "
            f"transform(image), from a PIL image to a tensor, in the file of the model, or give an .npz file"
        )
    return source.transform


def _arrays(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix.lower() == ".safetensors":
            return load_file(file)
        loaded = np.load(file, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded} if isinstance(loaded, Mapping) else {"arr_0": loaded}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (OSError, SafetensorError) as error:
        raise unreadable(file, error) from error
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise FxMergeError(f"{file} is not a file of arrays of numbers, as numpy.savez or numpy.save write") from error


def _arguments(arrays: dict[str, Tensor]) -> Any:
    """The only array; or a tuple of those that numpy.savez named by their place; or the dict, for arrays with names."""
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    places = [f"arr_{n}" for n in range(len(arrays))]
    return tuple(arrays[name] for name in places) if set(places) == set(arrays) else arrays


def _checked(arrays: dict[str, Tensor], source: Source, path: Path) -> Any:
    """Arrays as the example inputs: those with names are keyword arguments."""
    found = _arguments(arrays)
    if isinstance(found, dict) and isinstance(source.model, nn.Module):
        taken = inspect.signature(source.model.forward).parameters
        unknown = [name for name in arrays if name not in taken]
        if unknown and not any(p.kind == p.VAR_KEYWORD for p in taken.values()):
            raise FxMergeError(
                f"{path} holds {', '.join(arrays)}, but the model's forward takes {', '.join(taken)}; name the arrays "
                "as its arguments, and leave out others, such as labels"
            )
    return found


def _vocabulary(source: Source) -> int:
    model = source.model
    if isinstance(model, nn.Module):
        for module in nn.Module.modules(model):
            if isinstance(module, nn.Embedding):
                return module.num_embeddings
    raise FxMergeError(f"--ids: {source.spec} has no nn.Embedding that could take token ids; give --inputs FILE")


def _dtype(model: Any) -> torch.dtype | None:
    """The floating-point dtype of a model's first parameter; None if it has none."""
    given = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.dtype for p in given if p.is_floating_point()), None)
