"""The default decomposition: a stray partner is not kept, with data and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmerge import Options
from fxmerge.methods.evidence import Reading
from fxmerge.pipeline import prepared
from fxmerge.planning.statistics import moments_seen
from fxmerge.progress import silent
from tests.helpers.netmaking import Net, conv, one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def rectified_first(m: Any, x: Tensor) -> Tensor:
    x = m.n1(torch.relu(m.c1(x)))
    return m.fc(m.n2(torch.relu(m.c2(x))).mean((2, 3)))  # type: ignore[no-any-return]


def normed_first(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.n1(m.c1(x)))
    return m.fc(torch.relu(m.n2(m.c2(x))).mean((2, 3)))  # type: ignore[no-any-return]


def images(count: int) -> Tensor:
    """Smooth patterns and some noise."""
    low = F.interpolate(torch.randn(count, 3, 3, 3), size=12, mode="bilinear")
    return low + 0.3 * torch.randn(count, 3, 12, 12)


def fitted(forward: Any, x: Tensor) -> nn.Module:
    """Random layers whose BatchNorms have the statistics of x."""
    norms = {name: nn.BatchNorm2d(24, momentum=None) for name in ("n1", "n2")}
    model = Net(forward, c1=conv(3, 24), c2=conv(24, 24), fc=nn.Linear(24, 10), **norms)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def off(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y, z = model(x), other(x)
    return float((z - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("forward", [rectified_first, normed_first])
def test_partners_of_low_cosine_do_no_harm(forward: Any) -> None:
    """Independent random filters have no good partners: their published scale, of about 1, does more harm than none.

    Outputs of random networks vary much: the typical one of several is compared.
    """
    ways: list[dict[str, Any]] = [{}, {"decomposition": "prune"}, {"decomposition": "mostsim"}]
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        x, unseen = images(256), images(256)
        model = fitted(forward, x)
        found.append(
            [off(model, plain_merge(model, x[:2], ratio=0.25, threshold=0.0, **w).module, unseen) for w in ways]
        )
    auto, pruned, published = torch.tensor(found).log().mean(0).exp().tolist()
    print(auto, pruned, published)
    assert auto < 0.9 * min(pruned, published)


@pytest.mark.parametrize("forward", [rectified_first, normed_first])
def test_data_find_the_constants_that_weights_do_not_know(forward: Any) -> None:
    """Inputs far from white: with samples the drafts are better than with weights alone, and so is what is kept."""
    torch.manual_seed(0)
    mix = torch.randn(3, 3) + 1
    x, unseen = (torch.einsum("nchw,dc->ndhw", torch.rand(96, 3, 12, 12) ** 2, mix) for _ in range(2))
    model = fitted(forward, x)
    errors = []
    for given in (None, list(x.split(16))):
        options = Options(ratio=0.25, refit="none" if given is None else "synthetic")
        ready = prepared(model, x[:2], options, given, silent)
        draft = ready.draft(ready.choose(ready.options))
        errors.append(off(model, draft.graph, unseen))
    assert errors[1] < 0.75 * errors[0]


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [0, 6])
def test_inside_a_recurrent_layer_no_constant_is_lost(size: int, bias: bool) -> None:
    """A layer without a place for a constant is solved about zero; without data, partners get the cosine as scale."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 16, proj_size=size, batch_first=True, bias=bias)
            self.head = nn.Linear(size or 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.lstm(x)[0])
            return found

    torch.manual_seed(0)
    model, x = Tagger().eval(), torch.randn(64, 7, 5)
    auto, pruned, published = (
        off(model, plain_merge(model, x[:2], ratio=0.25, threshold=0.0, **options).module, x)
        for options in ({}, {"decomposition": "prune"}, {"decomposition": "mostsim"})
    )
    assert auto < published
    ready = prepared(model, x[:2], Options(ratio=0.25), [x], silent)
    assert off(model, ready.draft(ready.choose(ready.options)).graph, x) < pruned
