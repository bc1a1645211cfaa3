"""Rectifiers: activations that clamp their input to bounds and pass what is between them unchanged."""

from __future__ import annotations

from math import inf

from torch import fx

from fxmerge.rules.lookup import name_of, rule_of

Bounds = tuple[float, float]

# rule -> the names and defaults of its bounds, in the order of the arguments; None is no bound
_ARGUMENTS: dict[str, dict[str, float | None]] = {
    "relu": {},
    "relu6": {},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "clamp": {"min": None, "max": None},
    "clamp_min": {"min": None},
    "clamp_max": {"max": None},
}
_FIXED: dict[str, Bounds] = {"relu": (0.0, inf), "relu6": (0.0, 6.0)}


def bounds_of(node: fx.Node | None, module: fx.GraphModule) -> Bounds | None:
    """The bounds of a rectifier: (0, inf) for ReLU, (0, 6) for ReLU6. None for any other node, or bounds by tensors."""
    rule = "" if node is None else name_of(rule_of(node, module))
    if node is None or rule not in _ARGUMENTS:
        return None
    if rule in _FIXED:
        return _FIXED[rule]
    defaults = _ARGUMENTS[rule]
    if node.op == "call_module":
        owner = module.get_submodule(str(node.target))
        given = {name: getattr(owner, name) for name in defaults}
    else:
        named = {name: node.kwargs[name] for name in defaults if name in node.kwargs}
        given = defaults | dict(zip(defaults, node.args[1:], strict=False)) | named
    if not all(value is None or isinstance(value, (int, float)) for value in given.values()):
        return None
    least, most = (next((v for k, v in given.items() if k.startswith(side)), None) for side in ("min", "max"))
    return -inf if least is None else float(least), inf if most is None else float(most)
