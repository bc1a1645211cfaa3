"""The user's calibration data for models that are captured in parts: arguments in the structure of the example's.

Their arguments may be lists of tensors of different sizes, as detectors take images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.user_data import NO_SAMPLES, check_axes, named
from fxmerge.errors import FxMergeError
from fxmerge.graph.nested import tree
from fxmerge.ir.capture import Capture


@dataclass(frozen=True)
class Sample:
    """The arguments of one run of the user's code."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def count(self) -> int:
        """The number of samples in them: of tensors in a list, or along the first axis; 1 where arguments differ."""
        values = [*self.args, *self.kwargs.values()]
        lists = {len(v) for v in values if _is_list(v)}
        batches = {v.size(0) for v in values if isinstance(v, Tensor) and v.dim()}
        found = lists or batches
        return found.pop() if len(found) == 1 else 1

    def part(self, start: int, stop: int) -> Sample:
        """The samples from `start` to `stop`."""
        whole = self.count

        def some(value: Any) -> Any:
            if _is_list(value):
                return type(value)(value[start:stop])
            return value[start:stop] if isinstance(value, Tensor) and value.dim() and len(value) == whole else value

        return Sample(tuple(map(some, self.args)), {name: some(v) for name, v in self.kwargs.items()})


def example_of(captured: Capture) -> Sample:
    """The example inputs."""
    return Sample(captured.args, captured.kwargs)


def divided(batches: Iterable[Sample], size: int) -> Iterator[Sample]:
    """The same samples, at most `size` at a time."""
    for batch in batches:
        count = batch.count
        for start in range(0, count, size):
            yield batch if count <= size else batch.part(start, min(start + size, count))


def grouped(batches: Sequence[Sample], size: int) -> list[Sample]:
    """The same samples, `size` at a time; a rest is left out. Batches are divided, or joined where they are smaller.

    Raises RuntimeError where batches of different shapes would have to be joined.
    """
    found = list(divided(batches, size))
    if all(sample.count == size for sample in found):
        return found
    single = list(divided(batches, 1))
    return [_joined(single[start : start + size]) for start in range(0, len(single) - size + 1, size)]


def _joined(samples: Sequence[Sample]) -> Sample:
    """The samples, one each, as one batch."""

    def joined(values: Sequence[Any]) -> Any:
        first = values[0]
        if _is_list(first):
            return type(first)(item for value in values for item in value)
        batch = isinstance(first, Tensor) and first.dim() and len(first) == 1
        return torch.cat(list(values)) if batch else first

    args = tuple(map(joined, zip(*(sample.args for sample in samples), strict=True)))
    return Sample(args, {name: joined([s.kwargs[name] for s in samples]) for name in samples[0].kwargs})


def given_batch(captured: Capture, batch: Any) -> Sample:
    """One of the user's batches as arguments, in the dtypes and on the devices of the example inputs.

    Raises FxMergeError where they are not like the example inputs.
    """
    example, names = [*captured.args, *captured.kwargs.values()], list(captured.kwargs)
    if isinstance(batch, Mapping) and not names:
        raise FxMergeError("a calibration batch is a dict; the example inputs are positional: give a tuple of them")
    if isinstance(batch, Mapping):
        values = named(batch, names)
    else:
        alone = isinstance(batch, Tensor) or (_is_list(batch) and _is_list(example[0]))
        values = [batch] if alone else list(batch) if isinstance(batch, (tuple, list)) else []
        if len(values) < len(example):
            what = type(batch).__name__ if not values else f"{type(batch).__name__} of {len(values)}"
            raise FxMergeError(f"a calibration batch is a {what}; the model takes {len(example)} inputs, give a tuple")
    placed = [_placed(value, like) for value, like in zip(values, example, strict=False)]
    count = len(captured.args)
    return Sample(tuple(placed[:count]), dict(zip(names, placed[count:], strict=True)))


def _placed(value: Any, example: Any) -> Any:
    if isinstance(example, Tensor):
        check_axes(value, example)
        if not value.numel():
            raise FxMergeError(NO_SAMPLES)
        return value.to(example)
    if _is_list(example):
        if isinstance(value, Tensor) and value.dim() == example[0].dim() + 1:
            value = list(value)  # images of one size, stacked
        items = [value] if isinstance(value, Tensor) else value
        if not isinstance(items, (list, tuple)):
            what = f"a {type(items).__name__} where the example inputs have a {type(example).__name__} of tensors"
            raise FxMergeError(f"a calibration batch has {what}")
        if not items:
            raise FxMergeError(NO_SAMPLES)
        return type(example)(_placed(item, example[0]) for item in items)
    if isinstance(example, Mapping):
        if not isinstance(value, Mapping) or not set(example) <= set(value):
            raise FxMergeError(f"a calibration batch lacks a dict of {', '.join(map(str, example))}")
        return {name: _placed(value[name], inner) for name, inner in example.items()}
    return tree(lambda leaf: leaf, value)


def _is_list(value: Any) -> bool:
    """Whether a value is a list or a plain tuple of tensors."""
    plain = isinstance(value, list) or type(value) is tuple
    return plain and bool(value) and all(isinstance(item, Tensor) for item in value)


def varied(sample: Sample, count: int, vary: Callable[[Tensor, int], Tensor | None]) -> list[Sample]:
    """`count` variants of a sample. vary: (values with an axis of samples (n, ...), count) -> (count n, ...), or None.

    A tensor in a list is one sample.

    Integers, booleans and numbers stay; so do tensors that have no variants. Empty if all stay, or if count is 0.
    """
    if not count:
        return []
    changed = False

    def made(value: Any, in_list: bool) -> list[Any]:
        nonlocal changed
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            found = vary(value[None] if in_list else value, count)
            if found is not None:
                changed = True
                several = torch.split(found.to(value), 1 if in_list else len(value))
                return [v[0] if in_list else v for v in several]
        if _is_list(value):
            columns = [made(item, True) for item in value]
            return [type(value)(row) for row in zip(*columns, strict=True)]
        return [value] * count

    args = [made(value, False) for value in sample.args]
    kwargs = {name: made(value, False) for name, value in sample.kwargs.items()}
    if not changed:
        return []
    return [Sample(tuple(a[i] for a in args), {n: v[i] for n, v in kwargs.items()}) for i in range(count)]
