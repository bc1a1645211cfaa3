"""The rule of einsum: its equation is written out, then its operands are contracted one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

import torch

from fxmerge.ir.labels import simplify, varying
from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules.binary import operand_shape
from fxmerge.rules.context import RuleContext
from fxmerge.rules.contractions import Named, contract, named
from fxmerge.rules.layers import experts, maps_positions, matrix
from fxmerge.rules.rule import Answer, Operand, Unknown

Shape = tuple[int, ...]


def einsum(ctx: RuleContext, equation: Operand, *operands: Operand, tensors: Operand = None) -> Answer:
    """Any number of operands. An axis is summed as soon as neither a later operand nor the output has it."""
    given = operands[0] if tensors is None and len(operands) == 1 else tensors
    if isinstance(given, (list, tuple)):
        operands = tuple(given)
    if not isinstance(equation, str) or ctx.shape is None or not operands:
        return Unknown("is not given as an equation and operands")
    if len(operands) == 2 and sum(isinstance(o, Param) for o in operands) == 1:
        found = _weighs(ctx, equation, operands)
        if found is not None:
            return found
    shapes = [shape for shape in map(operand_shape, operands) if shape is not None]
    if len(shapes) < len(operands):
        return Unknown("has an operand that is not an activation")
    inputs, out = spelled(equation, [len(shape) for shape in shapes])
    if any(len(set(letters)) < len(letters) for letters in (*inputs, out)):
        return Unknown("takes a diagonal")
    found = named(ctx, operands, inputs)
    return found if isinstance(found, Unknown) else _activations(ctx, found, out, ctx.shape)


def _weighs(ctx: RuleContext, equation: str, operands: Sequence[Operand]) -> Answer | None:
    """A product of an activation with a weight over the last axis: a linear layer, or one for each expert. Else None.

    A weight of experts has three axes, of which the first numbers the experts.
    """
    at = int(isinstance(operands[0], Lab))
    x, weight = operands[1 - at], operands[at]
    if not isinstance(x, Lab) or not isinstance(weight, Param) or maps_positions(x):
        return None
    dims = [x.t.dim(), weight.value.dim()]
    given, out = spelled(equation, dims if at else dims[::-1])
    a, w = given[1 - at], given[at]
    if not a or not out or a[-1] in out or out[-1] in a or {a[-1], out[-1]} != set(w[-2:]):
        return None
    transposed = out[-1] == w[-1]
    if len(w) == 2 and out[:-1] == a[:-1]:
        return matrix(ctx, x, weight, transposed=transposed)
    return experts(ctx, x, weight, ctx.shape, transposed) if len(w) == 3 and w[0] in out else None


def spelled(equation: str, dims: list[int]) -> tuple[list[str], str]:
    """(the letters of each operand's axes, those of the output's): an ellipsis gets letters, the output is named."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    inputs = given.split(",")
    spare = [c for c in ascii_letters if c not in equation]
    missing = [d - len(letters.replace("...", "")) for d, letters in zip(dims, inputs, strict=True)]
    dots = "".join(spare[: max(0, *missing)])
    inputs = [i.replace("...", dots[len(dots) - m :] if m else "") for i, m in zip(inputs, missing, strict=True)]
    if arrow:
        return inputs, out.replace("...", dots)
    named = "".join(inputs)
    return inputs, dots + "".join(sorted(c for c in set(named) - set(dots) if named.count(c) == 1))


def _activations(ctx: RuleContext, operands: list[Named], out: str, shape: Shape) -> Lab | Unknown:
    sizes: dict[str, int] = {}
    for operand in operands:
        sizes |= {c: max(s, sizes.get(c, 1)) for c, s in zip(operand.letters, operand.t.shape, strict=True)}
    found = operands[0]
    for at, operand in enumerate(operands[1:], 1):
        last = at == len(operands) - 1
        later = "".join((*(o.letters for o in operands[at + 1 :]), out))
        result = out if last else "".join(c for c in dict.fromkeys(found.letters + operand.letters) if c in later)
        joined = contract(ctx, found, operand, result, tuple(sizes[c] for c in result))
        if isinstance(joined, Unknown):
            return joined
        found = Named(joined.t, result)
    if any(found.letters[axis] not in out for axis in varying(found.t)):
        return Unknown("sums over the channels of one operand alone")
    return Lab(simplify(torch.broadcast_to(found.laid_out(out), shape)))
