"""Attention whose channels are laid out as people write them: (channels of a head, heads), or q, k, v innermost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, SIZE, IN = 4, 8, 12


class Last(nn.Module):
    """Heads are the last factor of the channels."""

    heads_of_keys = HEADS

    def __init__(self) -> None:
        super().__init__()
        keys = self.heads_of_keys * SIZE
        self.q, self.k, self.v = nn.Linear(IN, HEADS * SIZE), nn.Linear(IN, keys), nn.Linear(IN, keys)
        self.o, self.out = nn.Linear(HEADS * SIZE, IN), nn.Linear(IN, 5)

    def laid_out(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], SIZE, heads)

    def forward(self, x: Tensor) -> Tensor:
        n = self.heads_of_keys
        return self.read(
            self.attend(self.laid_out(self.q(x), HEADS), *(self.laid_out(f(x), n) for f in (self.k, self.v)))
        )

    def read(self, y: Tensor) -> Tensor:
        return self.out(F.relu(self.o(y)))  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.turn(t.permute(0, 3, 1, 2)) if turned else t.permute(0, 3, 1, 2)
                   for t, turned in ((q, True), (k, True), (v, False)))  # fmt: skip
        return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).flatten(2)

    def turn(self, x: Tensor) -> Tensor:
        return x


class GroupedQueries(Last):
    heads_of_keys = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, *(t.repeat_interleave(2, 3) for t in (k, v)))


class NativeGroupedQueries(Last):
    heads_of_keys = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(0, 3, 1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).permute(0, 2, 3, 1).flatten(2)


class Rotary(Last):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freq", 1 / 100 ** (torch.arange(0, SIZE, 2) / SIZE))

    def turn(self, x: Tensor) -> Tensor:
        turns = torch.arange(x.shape[2])[:, None] * self.freq
        turns, (one, other) = torch.cat([turns, turns], -1), x.chunk(2, -1)
        return x * turns.cos() + torch.cat([-other, one], -1) * turns.sin()


class Einsum(Last):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (torch.einsum("bndh,bmdh->bhnm", q, k) * SIZE**-0.5).softmax(-1)
        return torch.einsum("bhnm,bmdh->bndh", p, v).reshape(q.shape[0], q.shape[1], -1)


class ScoresLast(Einsum):
    """The heads of the scores are the last axis, and a layer mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Linear(HEADS, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.talk(torch.einsum("bndh,bmdh->bnmh", q, k).softmax(2))
        return torch.einsum("bnmh,bmdh->bndh", p, v).flatten(2)


class Matmul(Last):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.permute(0, 3, 1, 2), k.permute(0, 3, 2, 1), v.permute(0, 3, 1, 2)
        p = (q @ k / q.size(-1) ** 0.5).softmax(-1)
        return (p @ v).permute(0, 2, 3, 1).reshape(q.shape[0], q.shape[2], -1)


class Folded(Last):
    """Samples and heads are one axis, for `bmm`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, n = q.shape[0], q.shape[1]
        q, k, v = (t.permute(0, 3, 1, 2).reshape(b * HEADS, n, -1) for t in (q, k, v))
        p = torch.bmm(q * SIZE**-0.5, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(p, v).view(b, HEADS, n, -1).permute(0, 2, 3, 1).reshape(b, n, -1)


class Mixed(Last):
    """The heads of queries are the last factor of their channels, those of keys and values the first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, (k, v) = (
            q.permute(0, 3, 1, 2),
            (t.reshape(t.shape[0], t.shape[1], HEADS, SIZE).transpose(1, 2) for t in (k, v)),
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AllHeads(Last):
    """Scores are summed over the heads: no place along them matters."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bnm,bmdh->bndh", torch.einsum("bndh,bmdh->bnm", q, k).softmax(-1), v).flatten(2)


class Fused(Last):
    """One layer writes queries, keys and values; where they stand among the other axes is in the class's layout."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(IN, 3 * HEADS * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.attend(*self.parts(self.qkv(x))))

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.view(y.shape[0], y.shape[1], 3, SIZE, HEADS).unbind(2)


class FusedBetween(Fused):
    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        y = y.unflatten(-1, (SIZE, 3, HEADS))
        return y[:, :, :, 0], y[:, :, :, 1], y[:, :, :, 2]


class FusedInnermost(Fused):
    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.squeeze(-1) for t in y.unflatten(-1, (SIZE, HEADS, 3)).chunk(3, -1))


class LightGlue(Fused):
    """Queries, keys and values innermost, heads first."""

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        y = y.unflatten(-1, (HEADS, -1, 3)).transpose(2, 3)
        return y.select(-1, 0), y.select(-1, 1), y.select(-1, 2)


EXACT = (Last, GroupedQueries, NativeGroupedQueries, Rotary, Einsum, ScoresLast, Matmul, Folded, Mixed, AllHeads, Fused,
         FusedBetween, FusedInnermost, LightGlue)  # fmt: skip


class Unit(Einsum):
    """Queries and keys of length 1."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(F.normalize(q, dim=2), F.normalize(k, dim=2), v)


class Normalised(Einsum):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self.norm(t.transpose(2, 3)).transpose(2, 3) for t in (q, k))
        return super().attend(q, k, v)


class SoftmaxOfSizes(Last):
    """A softmax over the channels of each head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.laid_out(self.q(x), HEADS).softmax(2).flatten(2))


class SoftmaxOfHeads(Last):
    """A softmax over the heads, which are the first factor of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.q(x).view(x.shape[0], x.shape[1], HEADS, SIZE).softmax(2).flatten(2))


class Product(Last):
    """Two layouts meet elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return self.read(
            (self.laid_out(self.q(x), HEADS) * self.k(x).view(b, n, HEADS, SIZE).transpose(2, 3)).flatten(2)
        )


class LengthByHand(Einsum):
    """Each head's queries are divided by their length: one number for each head, next to channels that stay."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q / q.square().sum(2, keepdim=True).sqrt(), k, v)


MIXING = (Unit, Normalised, SoftmaxOfSizes, SoftmaxOfHeads, Product, LengthByHand)
