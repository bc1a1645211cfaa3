"""Attention whose values pass a linear path, with heads and their layouts as in the wild."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HEAD = 24, 4, 6
LAYOUTS = ("heads", "grouped", "expanded", "innermost", "packed")


class Attention(nn.Module):
    """One block of attention. layout: how queries, keys and values are laid out over heads."""

    def __init__(self, layout: str, bias: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layout, kept = layout, HEADS // 2 if layout in ("grouped", "expanded") else HEADS
        self.kv = kept
        if layout == "packed":
            self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD, bias=bias)
        else:
            self.q = nn.Linear(WIDTH, HEADS * HEAD, bias=bias)
            self.k, self.v = (nn.Linear(WIDTH, kept * HEAD, bias=bias) for _ in range(2))
        self.o, self.head = nn.Linear(HEADS * HEAD, WIDTH, bias=bias), nn.Linear(WIDTH, 5)
        self.double().eval()

    def split(self, x: Tensor) -> Any:
        b, t = x.shape[:2]
        if self.layout == "packed":
            return self.qkv(x).view(b, t, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "innermost":  # the heads are the last factor of the channels
            return (f(x).view(b, t, HEAD, HEADS).permute(0, 3, 1, 2) for f in (self.q, self.k, self.v))
        q, k, v = (f(x).view(b, t, -1, HEAD).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.layout == "grouped":
            k, v = (y.repeat_interleave(HEADS // self.kv, 1) for y in (k, v))
        if self.layout == "expanded":
            k, v = (y[:, :, None].expand(b, self.kv, 2, t, y.shape[-1]).reshape(b, HEADS, t, -1) for y in (k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        q, k, v = self.split(x)
        if self.layout == "innermost":
            y = torch.softmax(q @ k.transpose(-1, -2) / HEAD**0.5, -1) @ v
            y = y.permute(0, 2, 3, 1)
        else:
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(torch.relu(x + self.o(y.reshape(b, t, -1))))  # type: ignore[no-any-return]


def tokens(count: int, seed: int = 1) -> Tensor:
    """Correlated tokens, (count, 9, WIDTH), float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.randn(count, 9, WIDTH, generator=generator, dtype=torch.float64)
    return drawn @ (mix / WIDTH**0.5) + 0.3
