"""Channels whose copies are moved in different ways can be dropped, but not merged into each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import verify
from tests.helpers.netmaking import Net, one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def stacked(m: Any, x: Tensor) -> Tensor:
    """Of the first channel only the second copy is left, of the last only the first; the others keep both."""
    return m.o(torch.stack([m.a(x), m.b(x)], 1).flatten(1).narrow(1, 1, 14))  # type: ignore[no-any-return]


def rolled(m: Any, x: Tensor) -> Tensor:
    """Both groups of the second layer lose one of two: 0 with 2 and 1 with 3. The roll turns one of the pairs round."""
    return m.o(F.relu(m.g(torch.roll(m.a(x), 1, 1))))  # type: ignore[no-any-return]


def twice(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.o(torch.cat([y, y], 1).roll(8, 1))  # type: ignore[no-any-return]


def pixels(m: Any, x: Tensor) -> Tensor:
    return m.o(m.a(x).roll((1, 2), (2, 3)).flatten(1).roll(16, 1))  # type: ignore[no-any-return]


CROSSED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "stacked": lambda: (Net(stacked, a=nn.Linear(5, 8), b=nn.Linear(5, 8), o=nn.Linear(14, 3)), torch.randn(4, 5)),
    "rolled": lambda: (
        Net(rolled, a=nn.Conv2d(3, 4, 1), g=nn.Conv2d(4, 8, 1, groups=2), o=nn.Conv2d(8, 3, 1)),
        torch.randn(2, 3, 4, 4),
    ),
}
IN_STEP: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "twice": lambda: (Net(twice, a=nn.Linear(5, 8), o=nn.Linear(16, 3)), torch.randn(4, 5)),
    "pixels": lambda: (Net(pixels, a=nn.Conv2d(3, 8, 1), o=nn.Linear(128, 3)), torch.randn(2, 3, 4, 4)),
}


def made(nets: dict[str, Callable[[], tuple[nn.Module, Tensor]]], name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = nets[name]()
    return randomised(net).double().eval(), x.double()


@pytest.mark.parametrize("name", CROSSED)
def test_channels_whose_copies_cross_are_no_partners(name: str) -> None:
    model, x = made(CROSSED, name)
    found = fxmerge.analyze(model, x)
    moved = verify.permutation(found.captured, found.facts, found.grouping)
    for g in found.groups:  # the oracle, which runs the model, agrees: only partners can be exchanged
        assert (moved[g.name] < 1e-10) == g.partners
    assert not all(g.partners for g in found.groups)
    result = plain_merge(model, x, ratio=0.5)
    parts = {p.name: p.partners for p in result.plan.groups}
    assert parts and all(p.into < 0 for g in found.groups if not g.partners for p in parts.get(g.name, ()))
    silent = verify.silence(found.captured, found.facts, found.grouping, result.plan)
    assert all(error < 1e-10 for error in silent.errors.values())


@pytest.mark.parametrize("name", IN_STEP)
def test_channels_whose_copies_keep_step_are_partners(name: str) -> None:
    found = fxmerge.analyze(*made(IN_STEP, name))
    (group,) = found.groups
    assert group.partners
    assert verify.permutation(found.captured, found.facts, found.grouping)["a"] < 1e-10


def test_former_names_of_members() -> None:
    (group,) = fxmerge.analyze(*made(IN_STEP, "twice")).groups
    assert group.writers == group.producers and [w.layer.module for w in group.writers] == ["a"]
    assert group.readers == group.consumers and [r.layer.module for r in group.readers] == ["o"]
