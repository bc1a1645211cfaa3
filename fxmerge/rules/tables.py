"""Movement ops on stacks and tables of experts: transposed matrices, and rows that values of the input choose."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fxmerge.ir.labels import holds, spread
from fxmerge.ir.provenance import Lab, Param, View
from fxmerge.rules.context import RuleContext
from fxmerge.rules.rule import Operand


def turns(ctx: RuleContext, args: tuple[Operand, ...], kwargs: dict[str, Any]) -> bool:
    """Does the op transpose each matrix of a stack, (n, a, b)?"""
    assert isinstance(args[0], Param)
    if args[0].value.dim() != 3 or ctx.rule_name not in ("transpose", "permute"):
        return False
    stack, target = torch.empty(2, 3, 5, device="meta"), ctx.target
    call = getattr(stack, target) if isinstance(target, str) else partial(target, stack)
    return tuple(call(*args[1:], **kwargs).shape) == (2, 5, 3)


def row_of(ctx: RuleContext, args: tuple[Operand, ...]) -> View | None:
    """table[i], (n, channels), for indices that depend on the input: the channels of the table, whatever the row."""
    table, index = args[0], args[-1]
    assert isinstance(table, Param)
    index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
    along = args[1] if ctx.rule_name == "index_select" else 0
    if table.value.dim() != 2 or not isinstance(index, Lab) or holds(index.t) or ctx.shape is None or along != 0:
        return None
    if tuple(ctx.shape) != (*index.t.shape, table.value.size(1)):
        return None  # a mask
    elements = ctx.elements(table)
    ctx.stack(table, elements[0], ctx.operand(len(args) - 1, "index"), rows=elements)
    return View(spread(elements[0], ctx.shape, len(ctx.shape) - 1), table)
