"""Attention whose scores are scaled by a function of its sizes, and half of whose channels are silent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

HEADS, SIZE, IN = 2, 16, 12
Scale = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Scores are scaled by a function of (module, queries, values, scores)."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(IN, HEADS * SIZE) for _ in range(3))
        self.o, self.scale = nn.Linear(HEADS * SIZE, IN), scale

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        w = self.scale(self, q, v, q @ k.transpose(-1, -2)).softmax(-1)
        return self.o((w @ v).transpose(1, 2).reshape(b, n, -1))  # type: ignore[no-any-return]


def halved(scale: Scale) -> nn.Module:
    """A model in which half of each head's channels are silent."""
    torch.manual_seed(0)
    model = Attention(scale).eval().double()
    gone = [i for i in range(HEADS * SIZE) if i % SIZE < SIZE // 2]
    with torch.no_grad():
        for f in (model.q, model.k, model.v):
            f.weight.mul_(2)
            f.weight[gone], f.bias[gone] = 0, 0
        model.o.weight[:, gone] = 0
    return model


def difference(model: nn.Module, merged: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = model(x)
        return float((merged(x) - y).norm() / y.norm())
