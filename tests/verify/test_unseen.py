"""Unseen inputs: other values of the same kind, and other sizes along axes that all tensors share."""

from __future__ import annotations

import torch

from fxmerge.verify import unseen


def test_values_are_others_of_the_same_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 16, 16, generator=generator)
    ids, mask = torch.randint(50, (2, 9), generator=generator), torch.ones(2, 9)
    mask[0, 5:] = 0
    first = unseen((image,), {"ids": ids, "mask": mask, "scale": 2.0})[0]
    assert first.name == "values"
    drawn = first.args[0]
    assert drawn.shape == image.shape
    assert not bool((drawn == image).any())
    assert image.min() <= drawn.min() <= drawn.max() <= image.max()
    assert abs(float(drawn.mean() - image.mean())) < 0.05
    for name, before in (("ids", ids), ("mask", mask)):
        after = first.kwargs[name]
        assert not torch.equal(after, before)
        assert sorted(after.flatten().tolist()) == sorted(before.flatten().tolist())
    assert first.kwargs["scale"] == 2.0


def test_sizes_change_in_all_tensors_that_share_them() -> None:
    tokens, mask, other = torch.randn(2, 6, 5), torch.ones(2, 6), torch.randn(4, 5)
    found = {i.name: [tuple(t.shape) for t in i.args[0]] for i in unseen(([tokens, mask, other],), {})}
    assert found["values"] == [(2, 6, 5), (2, 6), (4, 5)]
    assert found["batch 3"] == [(3, 6, 5), (3, 6), (4, 5)]
    assert found["batch 1"] == [(1, 6, 5), (1, 6), (4, 5)]
    assert found["axis 1: 7"] == [(2, 7, 5), (2, 7), (4, 5)]
    assert found["axis 1: 5"] == [(2, 5, 5), (2, 5), (4, 5)]


def test_both_sides_of_an_image_change_together() -> None:
    found = {i.name: tuple(i.args[0].shape) for i in unseen((torch.randn(1, 3, 8, 8),), {})}
    assert found["batch 2"] == (2, 3, 8, 8)
    assert (found["axes 2, 3: 4"], found["axes 2, 3: 12"]) == ((1, 3, 4, 4), (1, 3, 12, 12))
    assert not any(shape[2] != shape[3] for shape in found.values())


def test_the_same_seed_gives_the_same_inputs() -> None:
    x = torch.randn(2, 3)
    one, two, other = (unseen((x,), {}, seed)[0].args[0] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
