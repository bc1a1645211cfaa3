"""What users call the layer of a parameter, and what a node calls."""

from __future__ import annotations

import inspect

from torch import fx


def layer_name(path: str) -> str:
    """What users call the layer of a parameter: its module, or the parameter itself."""
    owner, _, name = path.rpartition(".")
    return owner if owner and (name in ("weight", "bias") or name.startswith(_RECURRENT)) else path


_RECURRENT = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")


def call_name(node: fx.Node) -> str:
    """The name of what a node calls: the module's path, the method, or the function."""
    target = node.target
    if isinstance(target, str):
        return target
    if inspect.isbuiltin(target):  # whose qualified names begin with the name of a class
        return target.__name__
    return getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)
