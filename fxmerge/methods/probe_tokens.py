"""Token ids for refit: the example's own tokens, moved and replaced, and tokens drawn at random."""

from __future__ import annotations

from math import prod

import torch
from torch import Generator, Tensor

NEAR = 8  # neighbours of a token in the embedding, among which its replacement is chosen
REPLACED = 0.5  # the largest share of an example's tokens that are replaced


def tokens(example: Tensor, table: Tensor, count: int, generator: Generator, stays: Tensor | None = None) -> Tensor:
    """Token ids made from the example (n, ..., length) of ids: (count, ..., length).

    table:  the embedding's weight, (vocabulary, features)
    stays:  where the example's tokens are kept, bool in the example's shape, as where padding is masked

    First the samples of the example; then, in turn, samples whose spans are moved, a random share of them replaced by
    tokens with a similar embedding or drawn by Zipf's law; and samples drawn by Zipf's law, with the ids ranked at
    random. The first and the last token that are not padding are kept, as they may be special. An example of equal
    tokens says nothing, and all tokens are drawn.
    """
    ids = example.long()
    drawn = zipf(len(table), count * prod(ids.shape[1:]), generator).reshape(count, *ids.shape[1:])
    if ids.numel() < 2 or bool((ids == ids.flatten()[0]).all()):
        return drawn.to(example.dtype)
    n = len(ids)
    chosen, turn = torch.arange(count) % n, torch.arange(count) // n
    kept = torch.zeros_like(ids, dtype=torch.bool) if stays is None else stays.clone()
    if ids.dim() > 1 and ids.size(-1) > 2:
        kept = kept | _ends(kept)
    source = ids[chosen]
    spans = _moved(source, kept[chosen], generator)
    share = REPLACED * torch.rand(count, *[1] * (ids.dim() - 1), generator=generator)
    draw = torch.rand(source.shape, generator=generator)
    similar = _similar(spans, table, generator)
    varied = torch.where(draw < share / 2, drawn, torch.where(draw < share, similar, spans))
    odd = (turn % 2 == 1).reshape(-1, *[1] * (ids.dim() - 1))
    made = torch.where(odd, varied, drawn)
    made = torch.where(kept[chosen], source, made)
    made[: min(n, count)] = ids[:count]
    return made.to(example.dtype)


def zipf(vocabulary: int, count: int, generator: Generator) -> Tensor:
    """Ids drawn by Zipf's law, with the ids ranked at random: (count,)."""
    rank = torch.randperm(vocabulary, generator=generator)
    weight = 1 / (1 + torch.arange(vocabulary, dtype=torch.float64))
    return rank[torch.multinomial(weight, count, replacement=True, generator=generator)]


def _ends(away: Tensor) -> Tensor:
    """The first and the last position of each line that is not padding, `away` (..., length): bool in this shape."""
    place = torch.arange(away.size(-1)).expand(away.shape)
    first = torch.where(away, away.size(-1), place).amin(-1, keepdim=True)
    last = torch.where(away, -1, place).amax(-1, keepdim=True)
    return (place == first) | (place == last)


def _moved(ids: Tensor, kept: Tensor, generator: Generator) -> Tensor:
    """The ids, the ones that are not kept rotated along their line by a random number of positions."""
    if ids.dim() < 2:
        return ids
    lines, fixed = ids.flatten(0, -2), kept.flatten(0, -2)
    length = lines.size(1)
    free = length - fixed.sum(1, keepdim=True)  # positions to move among
    order = (fixed.long() * length + torch.arange(length)).argsort(1)  # the free positions first, in their order
    offset = (torch.rand(len(lines), 1, generator=generator) * free).long()
    place = torch.arange(length).expand(lines.shape)
    turned = torch.where(place < free, (place + offset) % free.clamp(min=1), place)
    out = torch.empty_like(lines).scatter_(1, order, lines.gather(1, order.gather(1, turned)))
    return out.reshape(ids.shape)


def _similar(ids: Tensor, table: Tensor, generator: Generator) -> Tensor:
    """For each id one of the NEAR ids whose embeddings have the largest cosine with its own."""
    known, number = torch.unique(ids, return_inverse=True)
    known = known.clamp(0, len(table) - 1)  # ids that the model maps to others before the embedding
    rows = table.detach().float().cpu()
    unit = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)
    near = torch.cat(
        [(unit[part] @ unit.T).topk(min(NEAR, len(table)), dim=1).indices for part in torch.split(known, 256)]
    )
    return near[number, torch.randint(near.size(1), ids.shape, generator=generator)]
