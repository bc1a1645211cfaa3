"""The rule of einsum: its equation is spelled out, then its operands are contracted one after the other."""

from __future__ import annotations

from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from fxmerge.ir.labels import simplify, varying
from fxmerge.ir.provenance import Lab
from fxmerge.rules.contractions import contract, tables


def einsum(ctx: Any, equation: Any, *operands: Any, tensors: Any = None) -> Any:
    """Any number of operands; what is summed before the last of them is what neither the rest nor the output names."""
    if tensors is not None or (len(operands) == 1 and isinstance(operands[0], (list, tuple))):
        operands = tuple(operands[0] if tensors is None else tensors)
    if not isinstance(equation, str) or ctx.shape is None or not operands:
        return ctx.unknown("is not given as an equation and operands")
    operands = tables(ctx, *operands)
    if not all(isinstance(o, Lab) for o in operands):
        return ctx.unknown("has an operand that is no activation")
    inputs, out = spelled(equation, [o.t.dim() for o in operands])
    if any(len(set(letters)) < len(letters) for letters in (*inputs, out)):
        return ctx.unknown("takes a diagonal")
    return _activations(ctx, [o.t for o in operands], inputs, out)


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


def _activations(ctx: Any, labels: list[Tensor], inputs: list[str], out: str) -> Any:
    shape = ctx.shape
    sizes: dict[str, int] = {}
    for t, letters in zip(labels, inputs, strict=True):
        sizes |= {c: max(s, sizes.get(c, 1)) for c, s in zip(letters, t.shape, strict=True)}
    found, letters = labels[0], inputs[0]
    for at in range(1, len(labels)):
        later = out if at == len(labels) - 1 else "".join((*inputs[at + 1 :], out))
        result = "".join(c for c in dict.fromkeys(letters + inputs[at]) if c in later)
        result = out if at == len(labels) - 1 else result
        ctx.shape = tuple(sizes[c] for c in result)
        joined = contract(ctx, found, labels[at], letters, inputs[at], result)
        ctx.shape = shape
        if ctx.kind == "unknown":
            return joined
        found, letters = joined.t, result
    if any(letters[axis] not in out for axis in varying(found)):
        return ctx.unknown("sums over the channels of one operand alone")
    kept = found[tuple(slice(None) if c in out else 0 for c in letters)]
    order = [c for c in letters if c in out]
    return Lab(simplify(torch.broadcast_to(kept.permute([order.index(c) for c in out]), tuple(shape))))
