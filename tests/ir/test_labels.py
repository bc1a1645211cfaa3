"""Label tensors: invariants on random expanded tensors, and what is left of them against plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxmerge.ir.labels import FIXED, compact, fixed, numbers, simplify, spread, thin, varying

QUICK = settings(max_examples=100, deadline=None)


@st.composite
def label_tensors(draw: st.DrawFn) -> Tensor:
    """Labels that vary along some axes and not along others: expanded, materialised or permuted in memory."""
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    base = [size if draw(st.booleans()) else 1 for size in shape]
    values = draw(st.lists(st.integers(0, 9), min_size=math.prod(base), max_size=math.prod(base)))
    labels = torch.tensor(values, dtype=torch.int64).view(base)
    way = draw(st.sampled_from(["expanded", "copied", "permuted", "part of a larger one"]))
    labels = labels.expand(shape)
    if way == "copied":
        return labels.contiguous()
    if way == "permuted":
        return labels.permute(draw(st.permutations(range(len(shape)))))
    if way == "part of a larger one" and shape:
        return torch.cat([labels, labels], 0).repeat(*[1] * (len(shape) - 1), 40).narrow(-1, 0, shape[-1])[: shape[0]]
    return labels


def differs_along(labels: Tensor) -> tuple[int, ...]:
    array = labels.numpy()
    return tuple(a for a in range(array.ndim) if (array != np.take(array, [0], a)).any())


@QUICK
@given(label_tensors())
def test_simplify_has_stride_0_exactly_where_nothing_varies(labels: Tensor) -> None:
    found = simplify(labels)
    assert torch.equal(found, labels)
    assert found.dtype == torch.int64
    assert varying(found) == differs_along(labels)
    for axis in range(labels.dim()):
        if labels.size(axis) > 1:
            assert (found.stride(axis) != 0) == (axis in differs_along(labels))
    again = simplify(found)
    assert torch.equal(again, labels)
    assert varying(again) == varying(found)


@QUICK
@given(label_tensors())
def test_thin_keeps_the_labels_in_less_room(labels: Tensor) -> None:
    small = thin(simplify(labels))
    assert small.numel() == math.prod(labels.size(a) for a in differs_along(labels))
    assert torch.equal(small.expand(labels.shape), labels)
    any_thin = thin(labels)
    assert torch.equal(any_thin.expand(labels.shape), labels)
    assert any_thin.untyped_storage().data_ptr() == labels.untyped_storage().data_ptr()  # a view
    assert all(any_thin.stride(a) != 0 or any_thin.size(a) == 1 for a in range(labels.dim()))


@QUICK
@given(label_tensors())
def test_numbers_are_the_distinct_labels(labels: Tensor) -> None:
    assert numbers(labels).tolist() == sorted(set(labels.flatten().tolist()) - {FIXED})


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3)])
def test_fixed(shape: tuple[int, ...]) -> None:
    found = fixed(shape)
    assert found.shape == shape
    assert varying(found) == ()
    assert (found == FIXED).all()
    assert numbers(found).numel() == 0


@pytest.mark.parametrize(("shape", "axis"), [((4,), 0), ((2, 4), 1), ((4, 2, 3), 0), ((2, 3, 4), -1), ((2, 1, 3), 1)])
def test_spread(shape: tuple[int, ...], axis: int) -> None:
    channels = torch.arange(5, 5 + shape[axis])
    found = spread(channels, shape, axis)
    assert found.shape == shape
    for place in itertools.product(*(range(s) for s in shape)):
        assert int(found[place]) == 5 + place[axis]
    assert varying(found) == ((axis % len(shape),) if shape[axis] > 1 else ())


def test_a_large_activation_costs_its_channels() -> None:
    labels = torch.arange(256).view(1, 256, 1, 1).expand(32, 256, 56, 56)
    assert thin(simplify(labels)).numel() == 256
    assert simplify(labels).untyped_storage().nbytes() <= 256 * 8
    copied = torch.arange(16).view(1, 16, 1).expand(8, 16, 50).contiguous()
    assert simplify(copied).untyped_storage().nbytes() == 16 * 8


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Distinct labels along some axes of a shape, which of them live, and the places left along each axis."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    base = [size if draw(st.booleans()) else 1 for size in shape]
    labels = torch.arange(1, 1 + math.prod(base)).view(base)
    stay = [
        sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))) if wide > 1 else list(range(size))
        for size, wide in zip(shape, base, strict=True)
    ]
    alive = torch.zeros(1 + math.prod(base), dtype=torch.bool)
    alive[FIXED] = True
    inside = [s if wide > 1 else [0] for s, wide in zip(stay, base, strict=True)]
    alive[labels[np.ix_(*inside)].flatten()] = True
    return labels.expand(shape), alive, stay


@QUICK
@given(rectangles())
def test_compact_leaves_the_rectangle(case: tuple[Tensor, Tensor, list[list[int]]]) -> None:
    labels, alive, stay = case
    (found,) = compact(labels, alive)
    np.testing.assert_array_equal(found.numpy(), labels.numpy()[np.ix_(*stay)])
    assert thin(found).numel() <= thin(labels).numel()  # it stays expanded where it was


@QUICK
@given(st.data())
def test_compact_closes_ragged_blocks_along_their_axis(data: st.DataObject) -> None:
    """Each row along one axis loses places of its own, equally many."""
    shape = data.draw(st.lists(st.integers(2, 4), min_size=2, max_size=3))
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = shape.pop(axis)
    count = data.draw(st.integers(1, size))
    stays = {
        place: sorted(data.draw(st.permutations(range(size)))[:count])
        for place in itertools.product(*(range(s) for s in shape))
    }
    labels = torch.arange(1, 1 + size * math.prod(shape)).view(*shape, size)
    alive = torch.zeros(labels.numel() + 1, dtype=torch.bool)
    alive[FIXED] = True
    expected = torch.zeros(*shape, count, dtype=torch.int64)
    for place, kept in stays.items():
        alive[labels[place][kept]] = True
        expected[place] = labels[place][kept]
    found = compact(labels.movedim(-1, axis), alive)
    assert any(torch.equal(f, expected.movedim(-1, axis)) for f in found)
    for other in found:  # the same survivors, each once
        assert sorted(other.flatten().tolist()) == sorted(expected.flatten().tolist())


ABC = [[1, 2, 3], [4, 5, 6]]
BY_HAND: list[tuple[list[list[int]], set[int], list[list[list[int]]]]] = [
    (ABC, set(), [ABC]),
    (ABC, {2, 5}, [[[1, 3], [4, 6]]]),  # a column
    (ABC, {1, 2, 3}, [[[4, 5, 6]]]),  # a row
    (ABC, {1, 6}, [[[2, 3], [4, 5]]]),  # one of each row
    (ABC, {3, 6, 1, 5}, [[[2], [4]], [[4, 2]]]),  # a column first; then a diagonal, which closes either way
    (ABC, {1}, []),  # five of six fill nothing
    (ABC, {1, 2, 4}, []),
    ([[1, 2], [3, 4], [5, 6]], {1, 4, 5}, [[[2], [3], [6]]]),
    ([[1, 2], [3, 4]], {2, 3}, [[[1], [4]], [[1, 4]]]),
]


@pytest.mark.parametrize(("labels", "dead", "expected"), BY_HAND)
@pytest.mark.parametrize("expanded", [False, True])
def test_compact_by_hand(
    labels: list[list[int]], dead: set[int], expected: list[list[list[int]]], expanded: bool
) -> None:
    alive = torch.tensor([label not in dead for label in range(7)])
    given_labels = torch.tensor(labels)
    if expanded:
        given_labels = given_labels[None, :, None, :].expand(7, -1, 3, -1)
    found = compact(given_labels, alive)
    if expanded:
        assert all(torch.equal(f, f[:1, :, :1].expand_as(f)) and f.shape[::2] == (7, 3) for f in found)
        found = [f[0, :, 0] for f in found]
    assert sorted(f.tolist() for f in found) == sorted(expected)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_compact_of_nothing_alive(shape: tuple[int, ...]) -> None:
    """When every label has gone there is nothing to fill a rectangle with, in one axis or in two."""
    alive = torch.tensor([True] + [False] * 6)
    assert all(f.numel() == 0 for f in compact(torch.arange(1, 7).view(shape), alive))
