"""Probes: synthetic inputs that refit runs on where no calibration data is given.

PROBES maps the name of a family to a function of (example, count, generator). The example is one of the model's
floating-point inputs, (batch, ...). The function returns (count, ...), as standard numbers, which `probes` moves to
the mean and the deviation of the example. `fit_probes.mismatch` with the BatchNorms' running statistics chooses the
family.

    example  the example inputs, variants of them, and leaves or noise with their statistics (`probe_variants`); the
             family that is used if the example is data and there are no BatchNorms
    alike    the example inputs, flipped or moved, and variants of them; the family that is used if the example alone
             has rows enough to solve the layers, as where a network returns images
    white    independent Gaussian numbers
    pink     a spectrum of 1/f over the spatial axes, as images have, half of it common to all channels (Field, 1987)
    leaves   textured discs and boxes of random sizes that cover each other, which have edges (the dead leaves of Lee et
             al., 2001)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from fxmerge.methods.probe_families import leaves, pink, white
from fxmerge.methods.probe_statistics import placed
from fxmerge.methods.probe_tokens import tokens
from fxmerge.methods.probe_variants import alike, example

EXAMPLE, ALIKE = OF_EXAMPLE = ("example", "alike")  # families that are made of the example, and need not be placed
PROBES: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {
    "pink": pink, "white": white, "leaves": leaves, EXAMPLE: example, ALIKE: alike,
}  # fmt: skip


def sample_axis(value: object, count: int) -> int | None:
    """The axis of the samples of an input, of which there are `count`: the first, or the second as in the states of
    recurrent layers, (layers, samples, features); None for other inputs.
    """
    if not isinstance(value, Tensor) or not value.dim():
        return None
    if value.size(0) == count:
        return 0
    return 1 if value.dim() > 2 and value.is_floating_point() and value.size(1) == count else None


def batched(inputs: Sequence[object]) -> list[int]:
    """The indices of the inputs whose first axis is that of the samples: that of the first tensor."""
    return _along(inputs, 0)


def states(inputs: Sequence[object]) -> list[int]:
    """The indices of the inputs whose second axis is that of the samples."""
    return _along(inputs, 1)


def _along(inputs: Sequence[object], axis: int) -> list[int]:
    first = next((v for v in inputs if isinstance(v, Tensor) and v.dim()), None)
    return [] if first is None else [at for at, v in enumerate(inputs) if sample_axis(v, first.size(0)) == axis]


def probed(inputs: Sequence[object]) -> list[int]:
    """The indices of the inputs that get numbers of a family: floating-point ones with an axis of samples that are not
    masks.
    """
    found = []
    for place in batched(inputs):
        value = inputs[place]
        if isinstance(value, Tensor) and value.is_floating_point() and not is_mask(value, place, inputs):
            found.append(place)
    return found


def is_mask(value: Tensor, place: int, inputs: Sequence[object]) -> bool:
    """Whether a floating-point input says which parts of other inputs count: it holds minus infinity, or nothing but 0
    and 1 in the shape of an input of integers.
    """
    if bool(torch.isneginf(value).any()):
        return True
    shapes = [v.shape for v in inputs if isinstance(v, Tensor) and not v.is_floating_point()]
    return value.shape in shapes and bool(((value == 0) | (value == 1)).all())


def probes(
    family: str, inputs: Sequence[object], *, tables: Mapping[int, Tensor], count: int, batch: int, seed: int
) -> list[list[object]]:
    """`count` samples in batches of `batch`: by batch, values for a graph's placeholders, like the example's `inputs`.

    An input whose first axis is the example's batch gets new content: token ids if its number is in `tables`
    (placeholder number -> weight of an embedding, (vocabulary, features)), numbers of the family if it is
    floating-point, and otherwise the example's content, repeated. States, whose second axis is the example's batch,
    get noise with the example's mean and deviation. Another input, or one that is not a tensor, is used unchanged.
    Sample i is made from sample i % n of the n in the example, in all inputs.
    """
    if not batched(inputs):
        return [list(inputs)]
    sizes = [min(batch, count - start) for start in range(0, count, batch)]
    samples, drawn_anew, beside = batched(inputs), probed(inputs), states(inputs)
    stays = padding(inputs, tables)

    def made(number: int, value: object) -> list[object]:
        if number in beside and isinstance(value, Tensor):
            first = value.movedim(1, 0)
            drawn = placed(first, white(first, count, torch.Generator().manual_seed(seed + number))).to(value)
            return [part.movedim(0, 1).contiguous() for part in torch.split(drawn, sizes)]
        if number not in samples or not isinstance(value, Tensor):
            return [value] * len(sizes)
        generator = torch.Generator().manual_seed(seed)  # the same for every input, so that they are changed alike
        if number in tables and not _is_given(value, number, tables, inputs):
            drawn = tokens(value.cpu(), tables[number], count, generator, stays.get(tuple(value.shape)))
        elif number in drawn_anew:
            drawn = PROBES[family](value, count, generator)
            drawn = drawn if family in OF_EXAMPLE else placed(value, drawn)
        else:
            drawn = repeated(value, count)
        return list(torch.split(drawn.to(value), sizes))

    columns = [made(number, value) for number, value in enumerate(inputs)]
    return [list(row) for row in zip(*columns, strict=True)]


def repeated(value: Tensor, count: int) -> Tensor:
    """`count` samples of the example's content: sample i is sample i % n."""
    return value[torch.arange(count, device=value.device) % len(value)]


def padding(inputs: Sequence[object], tables: Mapping[int, Tensor]) -> dict[tuple[int, ...], Tensor]:
    """Shape -> where an attention mask of this shape is 0, so that the tokens there are kept: bool, (n, ...)."""
    found: dict[tuple[int, ...], Tensor] = {}
    for number, value in enumerate(inputs):
        if not isinstance(value, Tensor) or value.dim() < 2 or number not in batched(inputs):
            continue
        drawn = number in tables and not _is_given(value, number, tables, inputs)
        if not drawn and bool(((value == 0) | (value == 1)).all()):
            shape, away = tuple(value.shape), (value == 0).cpu()
            found[shape] = found[shape] | away if shape in found else away
    return found


def _is_given(value: Tensor, number: int, tables: Mapping[int, Tensor], inputs: Sequence[object]) -> bool:
    """Whether ids are no free choice: positions 0, 1, 2, ..., or segments beside tokens, which are all equal or have a
    vocabulary of at most 4.
    """
    ids = value.cpu()
    steps = ids.diff(dim=-1) if ids.dim() > 1 and ids.size(-1) > 2 else torch.zeros(1)
    if bool((steps == 1).all()):
        return True
    others = [inputs[n] for n in tables if n != number]
    beside = any(isinstance(other, Tensor) and bool((other != other.flatten()[0]).any()) for other in others)
    return beside and (len(tables[number]) <= 4 or bool((ids == ids.flatten()[0]).all()))
