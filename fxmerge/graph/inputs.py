"""Maps the arguments of a call to the placeholders of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves


def bind(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of the placeholders, in order; those of an exported graph are the leaves of the arguments."""
    if is_exported(module):
        return list(tree_leaves((args, dict(kwargs))))
    values, positional = [], list(args)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            values.append(positional.pop(0) if positional else kwargs.get(str(node.target), default))
    return values


def is_exported(module: fx.GraphModule) -> bool:
    """Whether torch.export made the graph. Such a graph takes flattened arguments, of the example's batch size only."""
    return pytree_codegen(module) is not None


def pytree_codegen(module: fx.GraphModule) -> fx.graph._PyTreeCodeGen | None:
    """The record of how an exported graph flattens its arguments and outputs; None for any other graph."""
    codegen = module.graph._codegen
    return codegen if isinstance(codegen, fx.graph._PyTreeCodeGen) else None
