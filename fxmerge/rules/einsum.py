"""The rule of einsum: its equation is written out, then its operands are contracted one after the other."""

from __future__ import annotations

from string import ascii_letters

import torch

from fxmerge.ir.labels import simplify, varying
from fxmerge.ir.provenance import Lab, Param
from fxmerge.rules.context import RuleContext
from fxmerge.rules.contractions import Named, contract, tables
from fxmerge.rules.layers import experts
from fxmerge.rules.rule import Answer, Operand, Unknown

Shape = tuple[int, ...]


def einsum(ctx: RuleContext, equation: Operand, *operands: Operand, tensors: Operand = None) -> Answer:
    """Any number of operands. An axis is summed as soon as neither a later operand nor the output has it."""
    given = operands[0] if tensors is None and len(operands) == 1 else tensors
    if isinstance(given, (list, tuple)):
        operands = tuple(given)
    if not isinstance(equation, str) or ctx.shape is None or not operands:
        return Unknown("is not given as an equation and operands")
    if len(operands) == 2 and isinstance(operands[0], Lab) and isinstance(operands[1], Param):
        found = _experts(ctx, equation, operands[0], operands[1])
        if found is not None:
            return found
    labels = [o for o in tables(ctx, *operands) if isinstance(o, Lab)]
    if len(labels) < len(operands):
        return Unknown("has an operand that is not an activation")
    inputs, out = spelled(equation, [o.t.dim() for o in labels])
    if any(len(set(letters)) < len(letters) for letters in (*inputs, out)):
        return Unknown("takes a diagonal")
    return _activations(ctx, [Named(o.t, letters) for o, letters in zip(labels, inputs, strict=True)], out, ctx.shape)


def _experts(ctx: RuleContext, equation: str, x: Lab, weight: Param) -> Answer:
    """A product with a weight of three axes, one of which numbers the experts, over the last axis; else None."""
    (a, w), out = spelled(equation, [x.t.dim(), weight.value.dim()])
    if len(w) != 3 or w[0] not in out or not out or out[-1] not in w[1:] or out[-1] in a:
        return None
    other = w[1] if out[-1] == w[2] else w[2]
    return experts(ctx, x, weight, ctx.shape, out[-1] == w[2]) if a[-1] == other and other not in out else None


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
