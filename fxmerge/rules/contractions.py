"""Rules of contractions: matmul, scaled_dot_product_attention (einsum: `einsums.py`).

The two sides of the contracted axis are tied; the labels of the other axes pass on. A batch axis that labels vary
along on both sides (attention heads) is tied as well, position by position, but what comes out where both sides'
channels were contracted away (attention scores) holds no channels: a head's scores are there as long as the head is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxmerge.ir.labels import fixed, holds, rows, simplify, varying
from fxmerge.ir.provenance import Lab, Param, View
from fxmerge.rules.binary import as_table, meets, operand_shape
from fxmerge.rules.layers import matrix


def contract(ctx: Any, a: Tensor, b: Tensor, letters_a: str, letters_b: str, letters_out: str) -> Any:
    """The rule for two label tensors whose axes are named by letters, as in einsum."""
    shape = ctx.shape
    if shape is None or len(set(letters_a)) < len(letters_a) or len(set(letters_b)) < len(letters_b):
        return ctx.unknown("takes a diagonal")
    ctx.contraction(a, b, letters_a, letters_b)
    summed = [c for c in letters_a if c in letters_b and c not in letters_out]
    alone = [c for c in letters_a + letters_b if c not in letters_out and c not in summed]
    varying_a = {letters_a[i] for i in varying(a)}
    varying_b = {letters_b[i] for i in varying(b)}
    if set(alone) & (varying_a | varying_b):
        return ctx.unknown("sums over the channels of one operand alone")
    shared = [c for c in letters_a if c in letters_b]
    if (varying_a | varying_b) & set(summed):
        # q k': tie what meets along the contracted axis, for each place along all others that channels stand on
        axes = shared + [c for c in letters_a + letters_b if c in (varying_a | varying_b) and c not in shared]
        one, other = _laid(a, letters_a, axes), _laid(b, letters_b, axes)
        if any(one.size(axis) == 1 for axis in varying(other)):
            one, other = other, one
        ctx.meet(one, other)
        batch = [c for c in shared if c not in summed and c in (varying_a | varying_b)]
        return _scores(ctx, ((a, letters_a), (b, letters_b)), batch, letters_out)
    if not varying_a and not varying_b:
        return Lab(fixed(shape))
    if varying_a == varying_b and varying_a <= set(shared):  # channel by channel
        one, other = (_laid(t, letters, list(letters_out)) for t, letters in ((a, letters_a), (b, letters_b)))
        ctx.tie(one, other)
        return Lab(simplify(torch.broadcast_to(one, tuple(shape))))
    if varying_a <= set(shared) and not varying_b <= set(shared):
        _numbered(ctx, a, letters_a, b, letters_b)
        varying_a = set()
    elif varying_b <= set(shared) and not varying_a <= set(shared):
        _numbered(ctx, b, letters_b, a, letters_a)
        varying_b = set()
    if varying_a and varying_b and holds(a) and holds(b):
        why, batch = "spreads two kinds of channels over each other", [c for c in shared if c in varying_a & varying_b]
        if not ctx.whole or not batch:
            return ctx.unknown(why)
        ctx.bond(rows(a, [letters_a.find(c) for c in batch]), pins=(a, ctx.said(why)))
        ctx.bond(rows(b, [letters_b.find(c) for c in batch]), pins=(b, ctx.said(why)))
        return _scores(ctx, ((a, letters_a), (b, letters_b)), batch, letters_out)
    if (varying_a | varying_b) <= set(shared):
        return ctx.unknown("has channels on a batch axis only")
    source, letters = (b, letters_b) if varying_b else (a, letters_a)
    labels = _laid(source, letters, list(letters_out))
    return Lab(simplify(torch.broadcast_to(labels, tuple(shape))))


def _scores(ctx: Any, operands: Any, batch: list[str], letters_out: str) -> Lab:
    """What is left where both sides' channels were summed: a number for each block, which lives as long as that."""
    if not ctx.whole or not batch:
        return Lab(fixed(ctx.shape))
    axes = [(t, [letters.find(c) for c in batch]) for t, letters in operands]
    whole = [(t, at) for t, at in axes if set(at) <= set(varying(t))]
    sizes = [max(_laid(t, letters, batch).size(at) for t, letters in operands) for at in range(len(batch))]
    number = ctx.numbered(sizes, [rows(t, at) for t, at in whole])
    return Lab(simplify(torch.broadcast_to(_laid(number, "".join(batch), list(letters_out)), tuple(ctx.shape))))


def _numbered(ctx: Any, numbers: Tensor, letters: str, channels: Tensor, letters_of: str) -> None:
    """Values of one number for each block meet the blocks: heads that are mixed stay each, and lose width."""
    axes = [letters_of.find(letters[at]) for at in varying(numbers)]
    blocks = set(axes) <= set(varying(channels))
    met = [letters_of.find(c) for at, c in enumerate(letters) if numbers.size(at) > 1]
    unnumbered = [axis for axis in met if axis in varying(channels) and axis not in axes]
    if ctx.whole and unnumbered:  # as many values as blocks, that do not leave
        staying = rows(channels, unnumbered)
        ctx.bond(torch.cat([fixed((len(staying), 1)), staying], 1))
    inside = [rows(numbers, varying(numbers)), rows(channels, axes)] if axes and blocks else []
    if inside:
        ctx.bond(torch.cat(inside, 1), pins=(numbers, "numbers the blocks of other channels"))
    else:
        ctx.pin(numbers, "numbers the blocks of other channels")


def _only(labels: Tensor, letters: str, kept: list[str]) -> Tensor:
    """The labels over some of their axes, in that order; along the others they do not vary."""
    index = tuple(slice(None) if c in kept else 0 for c in letters)
    left = [c for c in letters if c in kept]
    return labels[index].permute([left.index(c) for c in kept])


def _laid(labels: Tensor, letters: str, axes: list[str]) -> Tensor:
    """The labels over the axes named, in that order; of size 1 along those that they do not have."""
    found = _only(labels, letters, [c for c in axes if c in letters])
    for at, c in enumerate(axes):
        if c not in letters:
            found = found.unsqueeze(at)
    return found


def matmul(ctx: Any, a: Any, b: Any) -> Any:
    """a (..., m, k) @ b (..., k, n)."""
    if isinstance(a, Lab) and isinstance(b, Param) and b.value.dim() == 2:
        return matrix(ctx, a, b)
    a, b = tables(ctx, a, b)
    if not isinstance(a, Lab) or not isinstance(b, Lab) or a.t.dim() < 2 or b.t.dim() < 2:
        return ctx.unknown("has an operand that is no activation")
    batch = "abcdefgh"[: max(a.t.dim(), b.t.dim()) - 2]
    letters_a = batch[len(batch) - (a.t.dim() - 2) :] + "mk"
    letters_b = batch[len(batch) - (b.t.dim() - 2) :] + "kn"
    return _broadcast(ctx, a.t, b.t, letters_a, letters_b, batch + "mn")


def tables(ctx: Any, *operands: Any) -> tuple[Any, ...]:
    """Operands of which some are parameters and none holds an activation's channels, as labels; else as they are."""
    raw = [isinstance(o, (Param, View)) for o in operands]
    plain = [isinstance(o, Tensor) or (isinstance(o, Lab) and not holds(o.t)) for o in operands]
    if sum(raw) != 1 or not all(r or p for r, p in zip(raw, plain, strict=True)):
        return operands
    return tuple(as_table(ctx, o) for o in operands)


def outer(ctx: Any, input: Any, vec2: Any) -> Any:
    """input[i] vec2[j]."""
    a, b = tables(ctx, input, vec2)
    if not isinstance(a, Lab) or not isinstance(b, Lab):
        return ctx.unknown("has an operand that is no activation")
    return contract(ctx, a.t, b.t, "i", "j", "ij")


def addmm(ctx: Any, input: Any, mat1: Any, mat2: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    """input + mat1 @ mat2: a linear layer with its weight the other way round, where the last two are parameters."""
    if beta != 1 or alpha != 1 or not isinstance(input, Param) or input.value.dim() != 1:
        return ctx.unknown("adds something that is no bias")
    if not isinstance(mat1, Lab) or not isinstance(mat2, Param):
        return ctx.unknown("has a weight that is computed, not a parameter")
    return matrix(ctx, mat1, mat2, input)


def baddbmm(ctx: Any, input: Any, batch1: Any, batch2: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta input + alpha batch1 @ batch2, where what is added holds no channels (a bias of attention scores)."""
    if isinstance(input, Param) or (isinstance(input, Lab) and holds(input.t)):
        return ctx.unknown("adds something that holds channels")
    product = matmul(ctx, batch1, batch2)
    if ctx.kind != "unknown":
        _joined(ctx, product.t, input)
    return product


def _joined(ctx: Any, scores: Tensor, other: Any) -> bool:
    """What is added to scores is the same for all channels that they hold, or tied to them, or they stay."""
    if not meets(scores, operand_shape(other)):
        return False
    if isinstance(other, Lab) and len(varying(other.t)) < 2:
        ctx.tie(scores, other.t)
    else:
        ctx.pin(scores, "meets a constant tensor")
    return True


def _broadcast(ctx: Any, a: Tensor, b: Tensor, letters_a: str, letters_b: str, out: str) -> Any:
    """Batch axes of size 1 stretch to the other operand's size."""
    return contract(ctx, simplify(a), simplify(b), letters_a, letters_b, out)


def attention(
    ctx: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k' / scale) v: q (..., t, d), k (..., s, d), v (..., s, e) gives (..., t, e)."""
    if not all(isinstance(t, Lab) for t in (query, key, value)):
        return ctx.unknown("has an operand that is no activation")
    batch = "abcdefgh"[: query.t.dim() - 2]
    q, k, v = query.t, key.t, value.t
    if enable_gqa:  # each key head serves several query heads, one after the other
        k, v = (simplify(t.repeat_interleave(q.size(-3) // t.size(-3), -3)) for t in (k, v))
    held = ctx.shape
    ctx.shape = (*q.shape[:-1], k.shape[-2])
    scores = _broadcast(ctx, q, k, batch + "td", batch + "sd", batch + "ts")
    ctx.shape = held
    if ctx.kind == "unknown":
        return scores
    own = attn_mask is not None and _joined(ctx, scores.t, attn_mask)  # a mask for each block
    if not own and isinstance(attn_mask, Lab) and holds(attn_mask.t):
        ctx.pin(attn_mask.t, "is used as an attention mask")
    if isinstance(attn_mask, Param):
        ctx.freeze(attn_mask, "is used as an attention mask")
    return _broadcast(ctx, scores.t, v, batch + "ts", batch + "se", batch + "te")
