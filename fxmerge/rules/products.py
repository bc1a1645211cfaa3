"""Rules of products with other forms: tensordot, cosine_similarity, bilinear, and weights stacked by expert."""

from __future__ import annotations

from string import ascii_letters

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmerge.graph.ops import Aten
from fxmerge.ir.labels import fixed, holds, spread, varying
from fxmerge.ir.provenance import Lab, Param, Turned
from fxmerge.rules.binary import combined, operand_shape
from fxmerge.rules.context import RuleContext
from fxmerge.rules.contractions import Named, contract
from fxmerge.rules.elementwise import reduced
from fxmerge.rules.layers import experts, matrix
from fxmerge.rules.rule import Answer, Module, Operand, Rule, Unknown


def cosine_similarity(ctx: RuleContext, x1: Operand, x2: Operand, dim: int = 1, eps: float = 1e-8) -> Answer:
    """The cosine of two activations along an axis. Along the channels it is a mixer, whose result holds none."""
    sizes = operand_shape(x1), operand_shape(x2)
    if ctx.shape is None or sizes[0] is None or sizes[1] is None:
        return Unknown("gives something other than one tensor")
    met = combined(ctx, x1, x2, ctx.rule_name, tuple(torch.broadcast_shapes(*sizes)))  # type: ignore[no-untyped-call]
    return met if isinstance(met, Unknown) else reduced(ctx, met, dim, False, ctx.shape)


def pairwise_distance(
    ctx: RuleContext, x1: Operand, x2: Operand, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Answer:
    """The length of a difference along the last axis."""
    sizes = operand_shape(x1), operand_shape(x2)
    if ctx.shape is None or sizes[0] is None or sizes[1] is None:
        return Unknown("gives something other than one tensor")
    met = combined(ctx, x1, x2, ctx.rule_name, tuple(torch.broadcast_shapes(*sizes)))  # type: ignore[no-untyped-call]
    return met if isinstance(met, Unknown) else reduced(ctx, met, -1, keepdim, ctx.shape)


def tensordot(ctx: RuleContext, a: Operand, b: Operand, dims: Operand = 2, out: Operand = None) -> Answer:
    """A sum of products over the last `dims` axes of a and the first of b, or over axes that two lists name."""
    sizes = operand_shape(a), operand_shape(b)
    if sizes[0] is None or sizes[1] is None or ctx.shape is None:
        return Unknown("gives something other than one tensor")
    pairs = dims if isinstance(dims, (list, tuple)) else None
    if pairs is None and isinstance(dims, int):
        pairs = (list(range(-dims, 0)), list(range(dims)))
    if pairs is None or len(pairs) != 2:
        return Unknown("does not say its axes")
    of_a, of_b = ([axis % len(size) for axis in given] for given, size in zip(pairs, sizes, strict=True))  # type: ignore[arg-type]
    weighs = isinstance(a, Lab) and of_a == [a.t.dim() - 1] and (of_a[0] in varying(a.t) or not varying(a.t))
    if weighs and isinstance(b, Param) and b.value.dim() == 2 and of_b == [0]:
        return matrix(ctx, a, b)
    letters_a = ascii_letters[: len(sizes[0])]
    letters_b = list(ascii_letters[26 : 26 + len(sizes[1])])
    for one, other in zip(of_a, of_b, strict=True):
        letters_b[other] = letters_a[one]
    left = _mapping(ctx, a, b, of_b)
    right = _mapping(ctx, b, a, of_a)
    if left is None or right is None:
        return Unknown("has a weight on the axis of the channels")
    first, second = Named(left, letters_a), Named(right, "".join(letters_b))
    kept = [c for c in first.letters + second.letters if not (c in first.letters and c in second.letters)]
    return contract(ctx, first, second, "".join(kept), ctx.shape)


def _mapping(ctx: RuleContext, operand: Operand, other: Operand, summed: list[int]) -> Tensor | None:
    """The labels of an operand. A parameter or a constant may map positions of the other, but no channels."""
    if isinstance(operand, Lab):
        return operand.t
    if not isinstance(other, Lab) or set(summed) & set(varying(other.t)):
        return None
    ctx.freeze(operand, "maps positions, not channels")
    shape = operand_shape(operand)
    assert shape is not None
    return fixed(shape)


def bilinear(ctx: RuleContext, input1: Operand, input2: Operand, weight: Operand, bias: Operand = None) -> Answer:
    """y_k = x1' W_k x2 + b_k. W: (out, in1, in2). Its outputs may go; its inputs, which are multiplied, stay."""
    if not isinstance(input1, Lab) or not isinstance(input2, Lab) or not isinstance(weight, Param) or ctx.shape is None:
        return Unknown("has an operand that is not an activation, or a weight that is not a parameter")
    for x in (input1, input2):
        ctx.pin(x.t, "is multiplied by another input in a bilinear layer")
    writes = ctx.axis(weight, 0)
    if isinstance(bias, Param):
        ctx.tie(writes, ctx.axis(bias, 0))
    elif bias is not None:
        return Unknown("has a bias that is computed, not a parameter")
    ctx.layer("bilinear", {"weight": weight, "bias": bias}, writes=writes)
    return Lab(spread(writes, ctx.shape, len(ctx.shape) - 1))


def grouped_mm(
    ctx: RuleContext, input: Operand, mat2: Operand = None, offs: Operand = None, bias: Operand = None, *rest: Operand,
    weight: Operand = None, **kwargs: Operand,
) -> Answer:  # fmt: skip
    """Rows of the input times the matrix of their expert. W: (experts, in, out), or its transpose."""
    given = weight if mat2 is None else mat2
    matrices = given.param if isinstance(given, Turned) else given
    if not isinstance(matrices, Param) or matrices.value.dim() != 3 or bias is not None:
        return Unknown("has a weight that is not a parameter of three axes, or adds a bias")
    if isinstance(offs, Lab) and holds(offs.t):
        return Unknown("has offsets that hold channels")
    return experts(ctx, input, matrices, ctx.shape, not isinstance(given, Turned), ctx.operand(2, "offs"))


STACKED = ("grouped_mm",)  # rules that take a transposed stack of matrices as it is
_GROUPED = [f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None]
ROWS: tuple[Rule, ...] = (
    Rule("grouped_mm", "producer", grouped_mm, (*_GROUPED, Aten("transformers::grouped_mm_fallback"))),
    Rule("cosine_similarity", "mixer", cosine_similarity,
         (Module(nn.CosineSimilarity, ("dim", "eps")), F.cosine_similarity)),
    Rule("pairwise_distance", "mixer", pairwise_distance,
         (Module(nn.PairwiseDistance, ("keepdim",)), F.pairwise_distance)),
    Rule("tensordot", "contraction", tensordot, (torch.tensordot,)),
    Rule("bilinear", "producer", bilinear, (Module(nn.Bilinear, ("weight", "bias")), F.bilinear)),
)  # fmt: skip
