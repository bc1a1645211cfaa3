"""Maps the arguments of a call to the placeholders of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves


def bind(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of the placeholders, in order; those of an exported graph are the leaves of the arguments."""
    if isinstance(module.graph._codegen, fx.graph._PyTreeCodeGen):
        return list(tree_leaves((args, dict(kwargs))))
    values, positional = [], list(args)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            values.append(positional.pop(0) if positional else kwargs.get(str(node.target), default))
    return values


def fixed_batch(module: fx.GraphModule) -> bool:
    """Does the graph take the example's batch size only? One that torch.export made does."""
    return isinstance(module.graph._codegen, fx.graph._PyTreeCodeGen)
