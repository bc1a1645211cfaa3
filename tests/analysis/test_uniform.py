"""Ops that run over values that are the same for all channels, and so give a function of the width, keep the width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.scaled_attention import IN, SIZE, Scale, difference, halved

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS: dict[str, Scale] = {
    "sum of ones": lambda m, q, v, w: w / torch.ones_like(q).sum(-1, keepdim=True).sqrt(),
    "sum of one row": lambda m, q, v, w: w / torch.ones_like(q[0, 0, 0]).sum().sqrt(),
    "norm of ones": lambda m, q, v, w: w / torch.ones_like(q).norm(dim=-1, keepdim=True),
    "vector_norm": lambda m, q, v, w: w / torch.linalg.vector_norm(torch.full_like(q, 2.0), dim=-1, keepdim=True),
    "times 0": lambda m, q, v, w: w / (q * 0 + 1).sum(-1, keepdim=True),
    "to the 0": lambda m, q, v, w: w / (q**0).sum(-1, keepdim=True),
    "equal to itself": lambda m, q, v, w: w / (q == q).sum(-1, keepdim=True),
    "finite": lambda m, q, v, w: w / torch.isfinite(q).sum(-1, keepdim=True),
    "filled": lambda m, q, v, w: w / q.clone().fill_(1).sum(-1, keepdim=True),
    "softmax": lambda m, q, v, w: w * torch.zeros_like(q).softmax(-1)[..., :1],
    "logsumexp": lambda m, q, v, w: w * torch.zeros_like(q).logsumexp(-1, keepdim=True),
    "prod": lambda m, q, v, w: w / torch.full_like(q, 1.1).prod(-1, keepdim=True),
    "normalize": lambda m, q, v, w: w * F.normalize(torch.ones_like(q), dim=-1)[..., :1],
    "product of ones": lambda m, q, v, w: w / (torch.ones_like(q) @ torch.ones_like(q).mT),
    "einsum of ones": lambda m, q, v, w: (
        w / torch.einsum("bhnd,bhmd->bhnm", torch.ones_like(q), torch.ones_like(q))
    ),
    "distance": lambda m, q, v, w: w / F.pairwise_distance(torch.ones_like(q), torch.zeros_like(q))[..., None],
    "one number for all": lambda m, q, v, w: (
        w / (w.mean(-1, keepdim=True).abs() + torch.zeros_like(q)).sum(-1, keepdim=True)
    ),
    "expand_as": lambda m, q, v, w: w / w.mean(-1, keepdim=True).abs().expand_as(q).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_width_stays(name: str) -> None:
    """The values, which nothing counts, are dropped; the model is the same for other lengths, too."""
    model, x = halved(COUNTS[name]), torch.randn(2, 5, IN).double()
    result = plain_merge(model, x, ratio=0.5, decomposition="prune", selection="l2")
    assert [p.name for p in result.plan.groups] == ["v"]
    assert difference(model, result.module, torch.randn(3, 7, IN).double()) < 1e-12
    refused = {r.name: r for r in result.report.refusals}["q"]
    assert "runs over values that are the same for all channels, so its result would follow the width" in refused.reason
    assert refused.where


@pytest.mark.parametrize("name", ["sum of ones", "norm of ones", "softmax"])
def test_the_width_stays_in_an_exported_graph(name: str) -> None:
    model, x = halved(COUNTS[name]), torch.randn(2, 5, IN).double()
    exported: Any = torch.export.export(model, (x,)).module()
    result = plain_merge(exported, x, ratio=0.5, decomposition="prune", selection="l2")
    assert "q" in {r.name for r in result.report.refusals}
    assert difference(model, result.module, torch.randn(2, 5, IN).double()) < 1e-12


def test_constants_that_are_not_counted_follow() -> None:
    """Read by a layer, or added to a channel, ones are as wide as what they meet."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(IN, SIZE), nn.Linear(SIZE, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return self.b(y * torch.ones_like(y) + torch.zeros_like(y)) + self.b(torch.ones_like(y))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    result = plain_merge(Net().eval(), torch.randn(2, IN), ratio=0.5)
    assert result.module.get_submodule("a").out_features == SIZE // 2


def test_a_size_that_an_unknown_op_takes_as_a_value_stays() -> None:
    """`[t] * size` is a list of tensors, of which nothing else is known."""
    model = halved(lambda m, q, v, w: w / torch.cat([w[..., :1].abs()] * q.size(-1), -1).sum(-1, keepdim=True))
    result = plain_merge(model, torch.randn(2, 5, IN).double(), ratio=0.5, decomposition="prune", selection="l2")
    assert difference(model, result.module, torch.randn(3, 7, IN).double()) < 1e-12
