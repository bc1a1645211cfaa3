"""What users read in place of a node's name: the operation that the node computes."""

from __future__ import annotations

from torch import fx


def operation(node: fx.Node, module: fx.GraphModule) -> str:
    """The class of the module that a node calls, such as `GELU`, or the name of the function."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return function_name(node)


def function_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.removesuffix(".default")
