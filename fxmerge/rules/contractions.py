"""Rules of contractions: matmul, scaled_dot_product_attention (einsum is in `einsum.py`).

The labels of the two operands along the contracted axis are tied; the labels along the other axes pass on. A batch
axis that labels of both operands vary along (attention heads) is tied too, position by position. Where the channels of
both operands are contracted away (attention scores), the result holds no channels, only a number for each block: the
scores of a head exist as long as the head does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.ir.labels import fixed, holds, rows, simplify, varying
from fxmerge.ir.provenance import Lab, Param, View
from fxmerge.rules.binary import as_table, meets, operand_shape
from fxmerge.rules.context import RuleContext
from fxmerge.rules.layers import experts, maps_positions, matrix
from fxmerge.rules.rule import Answer, Operand, Unknown

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Named:
    """Labels whose axes are named by letters, as in einsum."""

    t: Tensor
    letters: str

    @property
    def varying(self) -> set[str]:
        """The axes that the labels vary along."""
        return {self.letters[axis] for axis in varying(self.t)}

    def axes(self, letters: Sequence[str]) -> list[int]:
        """The positions of some axes."""
        return [self.letters.find(c) for c in letters]

    def laid_out(self, letters: Sequence[str]) -> Tensor:
        """The labels over these axes, in this order: of size 1 along those that they lack, taken once along others."""
        found = self.t[tuple(slice(None) if c in letters else 0 for c in self.letters)]
        left = [c for c in self.letters if c in letters]
        found = found.permute([left.index(c) for c in letters if c in left])
        for at, c in enumerate(letters):
            if c not in left:
                found = found.unsqueeze(at)
        return found


def contract(ctx: RuleContext, a: Named, b: Named, out: str, shape: Shape) -> Lab | Unknown:
    """The labels of a sum of products of two operands, whose axes `out` names and which has that shape."""
    if len(set(a.letters)) < len(a.letters) or len(set(b.letters)) < len(b.letters):
        return Unknown("takes a diagonal")
    ctx.contraction(a.t, b.t, (a.letters, b.letters), out)
    summed = [c for c in a.letters if c in b.letters and c not in out]
    alone = [c for c in a.letters + b.letters if c not in out and c not in summed]
    a, b = _summed_over_blocks(ctx, a, b, summed), _summed_over_blocks(ctx, b, a, summed)
    varying_a, varying_b = a.varying, b.varying
    if set(alone) & (varying_a | varying_b):
        return Unknown("sums over the channels of one operand alone")
    shared = [c for c in a.letters if c in b.letters]
    for operand in (a, b):  # the other operand, or the result, has one value for each place along these axes
        batch = set(operand.varying - set(summed) if operand.varying & set(summed) else operand.varying & set(shared))
        ctx.hold_places(operand.t, operand.axes(sorted(batch - set(summed))), single=True)
    if (varying_a | varying_b) & set(summed):
        if any(not x.varying & set(summed) and x.varying & set(shared) and not ctx.is_number(x.t) for x in (a, b)):
            return Unknown("has channels on a batch axis only")
        # q k': tie what meets along the contracted axis, at each place along the other axes that labels vary along
        axes = shared + [c for c in a.letters + b.letters if c in (varying_a | varying_b) and c not in shared]
        one, other = a.laid_out(axes), b.laid_out(axes)
        if any(one.size(axis) == 1 for axis in varying(other)):
            one, other = other, one
        ctx.meet(one, other)
        numbered = [c for c in shared if c not in summed and c in (varying_a | varying_b)]
        return _scores(ctx, (a, b), numbered, out, shape)
    if not varying_a and not varying_b:
        return Lab(fixed(shape))
    if varying_a == varying_b and varying_a <= set(shared):  # channel by channel
        one, other = a.laid_out(out), b.laid_out(out)
        ctx.tie(one, other)
        return Lab(simplify(torch.broadcast_to(one, shape)))
    if varying_a <= set(shared) and not varying_b <= set(shared):
        _numbered(ctx, a, b)
        varying_a = set()
    elif varying_b <= set(shared) and not varying_a <= set(shared):
        _numbered(ctx, b, a)
        varying_b = set()
    if varying_a and varying_b and holds(a.t) and holds(b.t):
        why = "spreads two kinds of channels over each other"
        numbered = [c for c in shared if c in varying_a & varying_b]
        if not ctx.whole or not numbered:
            return Unknown(why)
        for operand in (a, b):
            ctx.bond(rows(operand.t, operand.axes(numbered)), pins=(operand.t, f"{ctx.called} {why}"))
        return _scores(ctx, (a, b), numbered, out, shape)
    if (varying_a | varying_b) <= set(shared):
        return Unknown("has channels on a batch axis only")
    labels = (b if varying_b else a).laid_out(out)
    return Lab(simplify(torch.broadcast_to(labels, shape)))


def _summed_over_blocks(ctx: RuleContext, x: Named, other: Named, summed: list[str]) -> Named:
    """Blocks that are added up with numbers which are the same for all channels: the same places of all are tied."""
    axes = varying(x.t)
    over = [axis for axis in axes if x.letters[axis] in summed]
    kept = {x.letters[axis] for axis in axes} - set(summed)
    if holds(other.t) or not over or axes[-1] in over or kept & set(other.letters):
        return x
    one = x.t[tuple(slice(0, 1) if axis in over else slice(None) for axis in range(x.t.dim()))]
    ctx.tie(one, x.t)
    return Named(simplify(one.expand(x.t.shape)), x.letters)


def _scores(ctx: RuleContext, operands: tuple[Named, Named], batch: list[str], out: str, shape: Shape) -> Lab:
    """What is left where the channels of both operands were summed: a number for each block, dropped with its block."""
    if not ctx.whole or not batch:
        return Lab(fixed(shape))
    whole = [(x.t, x.axes(batch)) for x in operands if set(batch) <= x.varying]
    sizes = [max(x.laid_out(batch).size(at) for x in operands) for at in range(len(batch))]
    number = ctx.numbered(sizes, [rows(t, axes) for t, axes in whole])
    return Lab(simplify(torch.broadcast_to(Named(number, "".join(batch)).laid_out(out), shape)))


def _numbered(ctx: RuleContext, numbers: Named, channels: Named) -> None:
    """One number for each block meets the blocks: heads are mixed, so that each of them stays, and may lose width."""
    axes = channels.axes([numbers.letters[at] for at in varying(numbers.t)])
    blocks = set(axes) <= set(varying(channels.t))
    met = channels.axes([c for at, c in enumerate(numbers.letters) if numbers.t.size(at) > 1])
    unnumbered = [axis for axis in met if axis in varying(channels.t) and axis not in axes]
    if ctx.whole and unnumbered:  # as many values as blocks, which do not leave
        staying = rows(channels.t, unnumbered)
        ctx.bond(torch.cat([fixed((len(staying), 1)), staying], 1))
    why = "numbers the blocks of other channels"
    if axes and blocks:
        inside = [rows(numbers.t, varying(numbers.t)), rows(channels.t, axes)]
        ctx.bond(torch.cat(inside, 1), pins=(numbers.t, why))
    else:
        ctx.pin(numbers.t, why)


def matmul(
    ctx: RuleContext, input: Operand = None, other: Operand = None, *, mat2: Operand = None, tensor2: Operand = None
) -> Answer:
    """a (..., m, k) @ b (..., k, n). The second operand has a name of its own in mm, bmm and Tensor.matmul."""
    a, b = input, next((o for o in (other, mat2, tensor2) if o is not None), None)
    if isinstance(a, Lab) and isinstance(b, Param) and not maps_positions(a):
        if b.value.dim() == 2:
            return matrix(ctx, a, b)
        if b.value.dim() == 3:
            return experts(ctx, a, b, ctx.shape)
    return _product(ctx, a, b)


def _product(ctx: RuleContext, a: Operand, b: Operand) -> Lab | Unknown:
    """A product of two activations, or of one with a raw parameter."""
    dims = [len(shape) - 2 for shape in map(operand_shape, (a, b)) if shape is not None]
    if len(dims) < 2 or min(dims) < 0 or ctx.shape is None:
        return Unknown("has an operand that is not an activation")
    batch = "abcdefgh"[: max(dims)]
    letters = [batch[len(batch) - dim :] + end for dim, end in zip(dims, ("mk", "kn"), strict=True)]
    found = named(ctx, (a, b), letters)
    return found if isinstance(found, Unknown) else contract(ctx, found[0], found[1], batch + "mn", ctx.shape)


def named(ctx: RuleContext, operands: Sequence[Operand], letters: Sequence[str]) -> list[Named] | Unknown:
    """The labels of operands whose axes are named by letters.

    A raw parameter that has an axis of the channels of an activation has labels of its own, which meet these. Any other
    maps positions, or blocks of channels (the adjacency of a graph): it treats all channels alike, and stays.
    """
    operands = tables(ctx, *operands)
    channels = {
        axes[varying(o.t)[-1]]
        for o, axes in zip(operands, letters, strict=True)
        if isinstance(o, Lab) and not isinstance(o, View) and varying(o.t)
    }
    found = []
    for operand, axes in zip(operands, letters, strict=True):
        known = Lab(fixed(operand.shape)) if isinstance(operand, Tensor) else operand
        if isinstance(operand, (Param, View)) and channels & set(axes):
            known = as_table(ctx, operand)
        elif isinstance(operand, (Param, View)) and channels:
            ctx.freeze(operand.param if isinstance(operand, View) else operand, "maps positions, not channels")
            known = Lab(fixed(operand_shape(operand) or ()))
        if not isinstance(known, Lab):
            return Unknown("has an operand that is not an activation")
        found.append(Named(simplify(known.t), axes))
    return found


def tables(ctx: RuleContext, *operands: Operand) -> tuple[Operand, ...]:
    """Operands as labels, where one of them is a raw parameter and the others hold no channels; else unchanged."""
    raw = [isinstance(o, (Param, View)) for o in operands]
    plain = [isinstance(o, Tensor) or (isinstance(o, Lab) and not holds(o.t)) for o in operands]
    if sum(raw) != 1 or not all(r or p for r, p in zip(raw, plain, strict=True)):
        return operands
    return tuple(as_table(ctx, o) for o in operands if isinstance(o, (Lab, Param, Tensor)))


def outer(ctx: RuleContext, input: Operand, vec2: Operand) -> Lab | Unknown:
    """input[i] vec2[j]."""
    a, b = tables(ctx, input, vec2)
    if not isinstance(a, Lab) or not isinstance(b, Lab) or ctx.shape is None:
        return Unknown("has an operand that is not an activation")
    return contract(ctx, Named(a.t, "i"), Named(b.t, "j"), "ij", ctx.shape)


def addmm(
    ctx: RuleContext, input: Operand, mat1: Operand, mat2: Operand, beta: Operand = 1, alpha: Operand = 1
) -> Answer:
    """input + mat1 @ mat2: a linear layer with its weight transposed, where input and mat2 are parameters."""
    if beta != 1 or alpha != 1 or not isinstance(input, Param) or input.value.dim() != 1:
        return Unknown("adds something that is not a bias")
    if not isinstance(mat1, Lab) or not isinstance(mat2, Param):
        return Unknown("has a weight that is computed, not a parameter")
    return matrix(ctx, mat1, mat2, input)


def baddbmm(
    ctx: RuleContext, input: Operand, batch1: Operand, batch2: Operand, beta: Operand = 1, alpha: Operand = 1
) -> Lab | Unknown:
    """beta input + alpha batch1 @ batch2, where input holds no channels (a bias of attention scores)."""
    if isinstance(input, Param) or (isinstance(input, Lab) and holds(input.t)):
        return Unknown("adds something that holds channels")
    product = _product(ctx, batch1, batch2)
    if isinstance(product, Lab):
        _joined(ctx, product.t, input)
    return product


def _joined(ctx: RuleContext, scores: Tensor, other: Operand) -> bool:
    """Has a term added to scores entries of its own for their blocks? Then its labels are tied or pinned."""
    shape = operand_shape(other)
    if shape is None or not meets(scores, shape):
        return False
    if isinstance(other, Lab) and len(varying(other.t)) < 2:
        ctx.tie(scores, other.t)
    else:
        ctx.pin(scores, "meets a constant tensor")
    return True


def attention(
    ctx: RuleContext,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Operand = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Lab | Unknown:
    """softmax(q k' / scale) v: q (..., t, d), k (..., s, d), v (..., s, e) give (..., t, e)."""
    query, key, value = (as_table(ctx, o) if isinstance(o, View) else o for o in (query, key, value))
    if not isinstance(query, Lab) or not isinstance(key, Lab) or not isinstance(value, Lab) or ctx.shape is None:
        return Unknown("has an operand that is not an activation")
    batch = "abcdefgh"[: query.t.dim() - 2]
    q, k, v = query.t, key.t, value.t
    if enable_gqa:  # each key head serves several query heads, one after the other
        k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
    q, k, v = simplify(q), simplify(k), simplify(v)
    of_scores = (*q.shape[:-1], k.shape[-2])
    scores = contract(ctx, Named(q, batch + "td"), Named(k, batch + "sd"), batch + "ts", of_scores)
    if isinstance(scores, Unknown):
        return scores
    own = attn_mask is not None and _joined(ctx, scores.t, attn_mask)  # a mask for each block
    if not own and isinstance(attn_mask, Lab) and holds(attn_mask.t):
        ctx.pin(attn_mask.t, "is used as an attention mask")
    ctx.freeze(attn_mask, "is used as an attention mask")
    return contract(ctx, Named(scores.t, batch + "ts"), Named(v, batch + "se"), batch + "te", ctx.shape)
