"""The default decomposition: a stray partner is not kept, with data and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmerge.methods.evidence import Reading
from fxmerge.planning.statistics import moments_seen
from tests.helpers.netmaking import Net, one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def rectified_first(m: Any, x: Tensor) -> Tensor:
    x = m.n1(torch.relu(m.c1(x)))
    return m.fc(m.n2(torch.relu(m.c2(x))).mean((2, 3)))  # type: ignore[no-any-return]


def normed_first(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.n1(m.c1(x)))
    return m.fc(torch.relu(m.n2(m.c2(x))).mean((2, 3)))  # type: ignore[no-any-return]


def fitted(forward: Any, x: Tensor) -> nn.Module:
    """Random layers whose BatchNorms have the statistics of x."""
    model = Net(forward, c1=nn.Conv2d(3, 24, 3, padding=1), n1=nn.BatchNorm2d(24, momentum=None),
                c2=nn.Conv2d(24, 24, 3, padding=1), n2=nn.BatchNorm2d(24, momentum=None), fc=nn.Linear(24, 10))  # fmt: skip
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def off(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y, z = model(x), other(x)
    return float((z - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("forward", [rectified_first, normed_first])
@pytest.mark.parametrize("seed", range(3))
def test_partners_of_low_cosine_do_no_harm(seed: int, forward: Any) -> None:
    """Independent random filters have no good partners: their published scale, of about 1, does more harm than none."""
    torch.manual_seed(seed)
    x, unseen = torch.randn(64, 3, 12, 12), torch.randn(64, 3, 12, 12)
    model = fitted(forward, x)
    auto, pruned, published = (
        off(model, plain_merge(model, x[:2], ratio=0.25, threshold=0.0, **options).module, unseen)
        for options in ({}, {"decomposition": "prune"}, {"decomposition": "mostsim"})
    )
    assert auto < 0.8 * min(pruned, published)


@pytest.mark.parametrize("q", [1, 4])
def test_moments_of_channels_are_those_over_all_places_of_patches(q: int) -> None:
    torch.manual_seed(0)
    n, rows = 5, 300
    x = torch.randn(rows, 4, q, dtype=torch.float64) + torch.randn(4, q)  # of channels 4, 0, 2 and 1
    flat, at = x.flatten(1), torch.tensor([4, 0, 2, 1])
    gram, columns = torch.cov(flat.T, correction=0), torch.arange(4 * q).view(4, q)
    mean, covariance = moments_seen(Reading(gram, torch.ones(1, 4 * q), at, columns, flat.mean(0)), n)
    values = torch.zeros(rows * q, n, dtype=torch.float64)
    values[:, at] = x.movedim(2, 1).reshape(-1, 4)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(covariance, torch.cov(values.T, correction=0))
