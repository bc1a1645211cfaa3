"""Products that add a bias in the same call, written as a product and a sum.

The rule of `baddbmm` is that of attention scores: its operands are activations. Where the matrices are a parameter, the
call is a layer of its own for each block, and the rules of `matmul` and `add` say all that there is to say about it.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fxmerge.rules.lookup import name_of, rule_of


def split(module: fx.GraphModule) -> None:
    """Rewrites baddbmm(b, x, w) as x @ w + b, in place, where w is a parameter and the terms are added as they are."""
    names, changed = ("input", "batch1", "batch2"), False
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "call_method") or name_of(rule_of(node, module)) != "baddbmm":
            continue
        named = {"input" if name == "self" else name: value for name, value in node.kwargs.items()}
        given = dict(zip(names, node.args, strict=False)) | named
        weight, factors = given["batch2"], given.keys() - set(names)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or any(given[k] != 1 for k in factors):
            continue
        with module.graph.inserting_before(node):
            product = module.graph.call_function(torch.matmul, (given["batch1"], weight))
        product.meta = dict(node.meta)
        node.op, node.target, node.args, node.kwargs = "call_function", operator.add, (product, given["input"]), {}
        changed = True
    if changed:
        module.graph.lint()
        module.recompile()
