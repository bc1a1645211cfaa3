"""Finds models whose forward reads `self.training`, which tracing freezes: `F.dropout(x, 0.1, self.training)`.

A graph of evaluation mode would stay one after `.train()`, without a word. Such a model is traced again in training
mode; where the two graphs differ, the captured one is for evaluation only.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from fxmerge.capture.expand_modules import expansion_of
from fxmerge.capture.frozen import restored
from fxmerge.capture.symbolic import Tracer, symbolic
from fxmerge.graph.nested import fresh, tree


def differs_in_training(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Is the graph of a model that torch.fx can trace in evaluation mode another one in training mode?

    A dropout with a probability of 0 is the same in both. True where the model cannot be traced in training mode.
    """
    if isinstance(model, fx.GraphModule) or not _reads_flag(model):
        return False
    flags, found = [(m, m.training) for m in nn.Module.modules(model)], []
    try:
        for mode in (False, True):
            for module, _ in flags:
                module.training = mode
            with restored(model):
                found.append(_calls(symbolic(model, fresh(args), fresh(dict(kwargs)))))
    except Exception:  # the user's code may raise anything
        return True
    finally:
        for module, flag in flags:
            module.training = flag
    return found[0] != found[1]


def _reads_flag(model: nn.Module) -> bool:
    """Does the code of a module that is traced name the attribute `training`?"""
    tracer = Tracer()
    traced = {
        type(m)
        for m in nn.Module.modules(model)
        if m is model or expansion_of(m) is not None or not tracer.is_leaf_module(m, "")
    }
    classes = {c for kind in traced for c in kind.__mro__ if issubclass(c, nn.Module) and c is not nn.Module}
    return any(_names_flag(f) for c in classes for f in vars(c).values())


def _names_flag(function: Any) -> bool:
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    waiting = [code] if isinstance(code, types.CodeType) else []
    while waiting:
        code = waiting.pop()
        if "training" in code.co_names:
            return True
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return False


def _calls(module: fx.GraphModule) -> list[tuple[Any, ...]]:
    """What each node calls, with its arguments; without the training flag of a dropout that drops nothing."""

    def known(leaf: Any) -> Any:
        return ("node", leaf.name) if isinstance(leaf, fx.Node) else leaf

    found = []
    for node in module.graph.nodes:
        kwargs = dict(node.kwargs)
        if kwargs.get("p", node.args[1] if len(node.args) > 1 else None) in (0, 0.0):
            kwargs.pop("training", None)
        call = (tree(known, tuple(node.args)), tree(known, kwargs))
        found.append((node.op, str(node.target), repr(call)))
    return found
