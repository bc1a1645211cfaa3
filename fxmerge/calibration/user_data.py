"""The user's calibration data, as values of a graph's placeholders.

Calibration data are tensors, tuples (whose further entries, such as labels, are ignored), dicts, a DataLoader, or a
generator, which is read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.trial_runs import refused
from fxmerge.errors import FxMergeError
from fxmerge.graph.inputs import bind, is_exported
from fxmerge.ir.capture import Capture

NO_BATCHES = "calibration holds no batches; a generator can be read only once"
NO_SAMPLES = "a calibration batch holds no samples; give tensors with at least one sample"


def given(captured: Capture, batches: Any, limit: int, size: int) -> tuple[list[list[Any]], bool]:
    """The user's batches as values of the graph's placeholders, at most about `limit` samples of them, and whether
    there are more.

    An exported model that does not take these batches gets the samples in batches of `size`, for which it was exported.

    Raises FxMergeError where the batches do not fit the model.
    """
    found: list[list[Any]] = []
    total = 0
    more = False
    for batch in iterable(batches):
        if more := total >= limit:
            break
        values = placed(captured, batch)
        count = next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 0)
        if count == 0:
            raise FxMergeError(NO_SAMPLES)
        found.append(values)
        total += count
    if not found:
        raise FxMergeError(NO_BATCHES)
    return (found if _taken(captured, found) else _regrouped(captured, found, size)), more


def iterable(batches: Any) -> Iterable[Any]:
    """The user's batches, or the only one. Raises FxMergeError for anything else."""
    if isinstance(batches, (Tensor, Mapping)):
        return [batches]
    if not isinstance(batches, Iterable):
        what = type(batches).__name__
        raise FxMergeError(f"calibration is of type {what}; give an iterable of batches, or a DataLoader")
    return batches


def named(batch: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The entries of a batch with these names. Raises FxMergeError if some are missing."""
    missing = [name for name in names if name not in batch]
    if missing:
        has = ", ".join(map(str, batch))
        raise FxMergeError(f"a calibration batch has no {', '.join(missing)}; it has {has}")
    return [batch[name] for name in names]


def check_axes(value: Any, example: Tensor) -> None:
    """Raises FxMergeError if a value of a batch is no tensor with as many axes as the example's."""
    if not (isinstance(value, Tensor) and value.dim() == example.dim()):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise FxMergeError(f"a calibration batch has {got} where the example inputs have {tuple(example.shape)}")


def _taken(captured: Capture, batches: Sequence[list[Any]]) -> bool:
    """Whether the model runs on the batches as they are; an exported one is tried on a batch of each shape."""
    by_shape = {_shapes(batch): batch for batch in batches if _shapes(batch) != _shapes(captured.inputs)}
    return not is_exported(captured.module) or not any(refused(captured, batch) for batch in by_shape.values())


def placed(captured: Capture, batch: Any) -> list[Any]:
    """One batch as values of the placeholders, on the devices and in the dtypes of the example inputs."""
    names = list(captured.kwargs)
    if isinstance(batch, Mapping):
        placeholders = [str(n.target) for n in captured.module.graph.nodes if n.op == "placeholder"]
        wanted = names or placeholders[: len(captured.args)]
        entries = named(batch, wanted)
        args, kwargs = ((), dict(zip(names, entries, strict=True))) if names else (tuple(entries), {})
    else:
        parts = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, (tuple, list)) else None
        count = len(names) or len(captured.args)
        if parts is None or len(parts) < count:
            what = type(batch).__name__ if parts is None else f"{type(batch).__name__} of {len(parts)}"
            raise FxMergeError(f"a calibration batch is a {what}; the model takes {count} inputs, give a tuple")
        args = () if names else parts[:count]
        kwargs = dict(zip(names, parts, strict=False))
    values = bind(captured.module, args, kwargs)
    for value, example in zip(values, captured.inputs, strict=True):
        if isinstance(example, Tensor):
            check_axes(value, example)
    return [v.to(e) if isinstance(e, Tensor) else v for v, e in zip(values, captured.inputs, strict=True)]


def _regrouped(captured: Capture, batches: Sequence[list[Any]], size: int) -> list[list[Any]]:
    """The same samples in batches of `size`, in the shapes of the example inputs.

    A smaller last batch is dropped. Inputs whose first axis is not that of the samples are taken from the first batch.
    Raises FxMergeError where samples cannot be told apart, as where the first axis is a sequence.
    """
    columns = []
    for parts, example in zip(zip(*batches, strict=True), captured.inputs, strict=True):
        if not isinstance(example, Tensor) or not example.dim():
            columns.append([parts[0]])
        elif example.size(0) == size and len({part.shape[1:] for part in parts}) == 1:
            whole = torch.cat(parts)
            if len(whole) < size:
                raise FxMergeError(f"calibration holds {len(whole)} samples; the exported model takes {size} at a time")
            columns.append(list(torch.split(whole[: len(whole) // size * size], size)))
        elif all(part.shape == example.shape for part in parts):
            columns.append([parts[0]])
        else:
            other = next(tuple(part.shape) for part in parts if part.shape != example.shape)
            raise FxMergeError(
                f"a calibration batch has an input of shape {other} where the exported model takes "
                f"{tuple(example.shape)}; give batches in the shapes of the example inputs"
            )
    length = max(map(len, columns))
    if any(len(column) not in (1, length) for column in columns):
        raise FxMergeError(
            "calibration batches have other numbers of samples in different inputs of the exported model"
        )
    return [list(row) for row in zip(*(c * length if len(c) == 1 else c for c in columns), strict=True)]


def _shapes(values: Sequence[Any]) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(tuple(v.shape) if isinstance(v, Tensor) else None for v in values)
