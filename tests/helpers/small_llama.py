"""A small language model of the Llama layout, and samples for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, WIDTH, LENGTH = 40, 16, 6


class Layer(nn.Module):
    """Attention with two heads, and a gated MLP, each with a norm and a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 48, bias=False)
        self.down = nn.Linear(48, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        q, k, v = (f(y).view(-1, LENGTH, 2, WIDTH // 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(z.transpose(1, 2).reshape(-1, LENGTH, WIDTH))
        y = self.two(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, depth: int = 2, wide: Any = None) -> None:
        super().__init__()
        self.words, self.layers = nn.Embedding(WORDS, WIDTH), nn.Sequential(*(Layer() for _ in range(depth)))
        self.norm, self.head, self.wide = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS), wide

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x if self.wide is None else self.wide(x)
        out: Tensor = self.head(self.norm(self.layers(x)))
        return out


def made(**kwargs: Any) -> tuple[Llama, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model, ids = Llama(**kwargs).eval(), torch.randint(WORDS, (48, LENGTH))
    return model, ids[:2], list(ids.split(8))
