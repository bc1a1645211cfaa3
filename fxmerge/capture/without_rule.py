"""Counts the calls of a graph that have no rule, by which one capture of a model is preferred to another."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx._symbolic_trace import _assert_is_none

from fxmerge.rules.lookup import rule_of

# torch.fx's checks that arguments left out stay left out, and what torch.export asserts of numbers read from tensors
_CHECKS = (_assert_is_none, torch._assert, torch.ops.aten._assert_scalar.default)


def without_rule(module: fx.GraphModule) -> int:
    """The number of calls in a graph that have no rule. Calls on plain values and constants are not counted."""
    count = 0
    activations: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            activations.add(node)
        elif node.target in _CHECKS:
            continue
        elif node.op in ("call_module", "call_function", "call_method") and activations & set(node.all_input_nodes):
            found = rule_of(node, module)
            if found is None or found.kind != "query":
                activations.add(node)
                count += found is None
    return count
