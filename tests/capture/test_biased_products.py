"""Products that add a bias in the same call (baddbmm) lose channels where their matrices are a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxmerge import verify
from fxmerge.capture.torch_export import export
from tests.helpers.netmaking import Net, one_thread, plain_merge, randomised, raw  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def product(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.baddbmm(b, x, w)


def method(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return b.baddbmm(batch1=x, batch2=w)


def halved(b: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.baddbmm(b, x, w, beta=0.5)


def gated(call: Any) -> Any:
    """A gate of two blocks, each with its own matrix and bias, as in RecurrentGemma."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        h = m.inner(x)
        blocks = h.reshape(-1, 2, 6).permute(1, 0, 2)
        gate = call(m.bias[:, None, :], blocks, m.weight).transpose(0, 1).reshape(-1, 12)
        return m.out(h * gate.sigmoid())

    return wiring


@pytest.mark.parametrize(
    ("call", "width", "exported"), [(product, 6, False), (product, 6, True), (method, 6, False), (halved, 12, False)]
)
def test_a_bias_for_each_block(call: Any, width: int, exported: bool) -> None:
    layers = {"inner": torch.nn.Linear(5, 12), "out": torch.nn.Linear(12, 3)}
    net = randomised(Net(gated(call), weight=raw(2, 6, 6), bias=raw(2, 6), **layers)).double().eval()
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = plain_merge(export(net, (x,), {}) if exported else net, x, ratio=0.5)
    assert dict(result.module.named_parameters())["inner.weight"].size(0) == width
    found = result.analysis
    values = verify.unseen(found.captured.args, found.captured.kwargs)[:1]
    silence = verify.silence(found.captured, found.facts, found.grouping, result.plan, each=False, inputs=values)
    assert width == 12 or silence.errors["all"] < 1e-10
