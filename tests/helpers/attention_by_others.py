"""Nets as other people write them: attention in its many forms, and recurrent layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.written_by_others import IMAGE, TOKENS, conv, other


@other(*TOKENS)
class PackedAttention(nn.Module):
    """nanoGPT's attention: one projection that is split, a causal mask from a buffer, and a literal scale."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.heads, self.size = 2, 4 * n
        self.stem, self.norm = nn.Linear(5, 6 * n), nn.LayerNorm(6 * n)
        self.attn, self.proj, self.out = nn.Linear(6 * n, 24 * n), nn.Linear(8 * n, 6 * n), nn.Linear(6 * n, 3)
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)).view(1, 1, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, _ = x.size()
        q, k, v = self.attn(self.norm(x)).split(2 * self.size, dim=2)
        q, k, v = (p.view(b, t, self.heads, self.size).transpose(1, 2) for p in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / self.size**0.5)
        att = F.softmax(att.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")), dim=-1)
        return self.out(x + self.proj((att @ v).transpose(1, 2).contiguous().view(b, t, 2 * self.size)))


class Grouped(nn.Module):
    """Attention with four query heads for two key heads; subclasses differ in how keys are repeated for the queries."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.size = 3 * n
        self.stem, self.out = nn.Linear(5, 6 * n), nn.Linear(6 * n, 3)
        self.q, self.k, self.v = nn.Linear(6 * n, 12 * n), nn.Linear(6 * n, 6 * n), nn.Linear(6 * n, 6 * n)
        self.o = nn.Linear(12 * n, 6 * n)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, self.size).transpose(1, 2)
        k, v = (p(x).view(b, t, 2, self.size).transpose(1, 2) for p in (self.k, self.v))
        return self.out(x + self.o(self.attend(q, k, v).transpose(1, 2).reshape(b, t, -1)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


@other(*TOKENS)
class GroupedRepeated(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@other(*TOKENS)
class GroupedExpanded(Grouped):
    """The repeat_kv of transformers."""

    def repeated(self, x: Tensor) -> Tensor:
        b, heads, t, size = x.shape
        return x[:, :, None, :, :].expand(b, heads, 2, t, size).reshape(b, heads * 2, t, size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.repeated(k), self.repeated(v)
        weights = torch.matmul(q, k.transpose(2, 3)) * 0.5
        return torch.matmul(nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype), v)


@other(*TOKENS)
class GroupedByOption(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@other(*IMAGE)
class Windows(nn.Module):
    """Swin's block: shifted windows, and a bias by relative position from a table of two heads."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.size, self.stem, self.norm = 3 * n, conv(3, 8 * n), nn.LayerNorm(8 * n)
        self.qkv, self.proj, self.out = nn.Linear(8 * n, 18 * n), nn.Linear(6 * n, 8 * n), nn.Linear(8 * n, 3)
        self.table = nn.Parameter(torch.zeros(49, 2))
        y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        at = torch.stack([y.flatten(), x.flatten()])
        apart = at[:, :, None] - at[:, None, :] + 3
        self.register_buffer("index", apart[0] * 7 + apart[1])

    def attention(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * self.size**-0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(16, 16, -1).permute(2, 0, 1).contiguous()
        weights = (weights + bias.unsqueeze(0)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), shifts=(-2, -2), dims=(1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = self.attention(y).view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.out((x + torch.roll(y, shifts=(2, 2), dims=(1, 2))).mean((1, 2)))


def padded_words() -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.randint(9, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return {"input_ids": ids, "attention_mask": mask}


@other(example=padded_words)
class MaskedEncoder(nn.Module):
    """BERT: embeddings of words and positions, a padding mask from the caller, and the first token as the output."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.words, self.positions, self.norm = nn.Embedding(9, 8 * n), nn.Embedding(6, 8 * n), nn.LayerNorm(8 * n)
        self.q, self.k, self.v = (nn.Linear(8 * n, 8 * n) for _ in "qkv")
        self.o, self.out = nn.Linear(8 * n, 8 * n), nn.Linear(8 * n, 3)
        self.register_buffer("ids", torch.arange(6)[None])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norm(self.words(input_ids) + self.positions(self.ids))
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out((x + self.o(y.transpose(1, 2).flatten(2)))[:, 0])


@other(*IMAGE)
class ClassToken(nn.Module):
    """A ViT: patches, a class token, positions, nn.MultiheadAttention."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8 * n, 4, 4), nn.Parameter(torch.zeros(1, 1, 8 * n))
        self.position, self.norm = nn.Parameter(torch.zeros(1, 5, 8 * n)), nn.LayerNorm(8 * n)
        self.up, self.down, self.out = nn.Linear(8 * n, 12 * n), nn.Linear(12 * n, 8 * n), nn.Linear(8 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.position
        return self.out((x + self.down(F.gelu(self.up(self.norm(x)))))[:, 0])


class Recurrent(nn.Module):
    """A text recogniser: convolutions, a recurrent layer over the columns, and layers after it."""

    rnn: nn.Module

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8 * n), conv(8 * n, 4 * n)
        self.c, self.out = nn.Linear(5 * n, 6 * n), nn.Linear(6 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x))).mean(2).permute(0, 2, 1)
        x, _ = self.rnn(x)
        return self.out(F.relu(self.c(x)))


@other(*IMAGE)
class BehindLstm(Recurrent):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.rnn = nn.LSTM(4 * n, 5 * n, batch_first=True)


@other(*IMAGE)
class BehindGru(Recurrent):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.rnn = nn.GRU(4 * n, 5 * n, batch_first=True)
