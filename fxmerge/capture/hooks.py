"""Traces the hooks of leaf modules.

torch.fx does not run the hooks of a leaf module while it traces: what they store would be a value of an earlier run,
and what they return would be unknown to the graph. Here, they run on the proxies of the call, so that the graph does
what they do. The leaf in the graph is a shallow copy without hooks.

A hook that cannot run on proxies, or that stores a proxy in its module (as hooks that compute weights do), stays on
its leaf instead.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxmerge.errors import of_user
from fxmerge.graph.ops import updates


def hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks or forward pre-hooks of the user."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(of_user(getattr(getattr(hook, "__code__", None), "co_filename", "")) for hook in map(_function, hooks))


def _function(hook: Any) -> Any:
    """The function that a hook runs: itself, that of a method, of a partial, or of a callable object."""
    hook = getattr(hook, "func", hook)
    hook = getattr(hook, "__func__", hook)
    return hook if hasattr(hook, "__code__") else type(hook).__call__


def overridden(module: nn.Module) -> bool:
    """Whether an instance has a forward that replaces that of its class."""
    forward = vars(module).get("forward")
    return forward is not None and not isinstance(module, fx.GraphModule) and getattr(forward, "overrides", True)


@contextmanager
def replaced_forwards(model: nn.Module, wrap: Callable[[nn.Module, str], Callable[..., Any]]) -> Iterator[None]:
    """Gives each submodule the forward `wrap(module, path)`; restores those that instances override on exit.

    Raises TypeError for models with ScriptModules.
    """
    modules = {module: path for path, module in model.named_modules() if path}
    for module, path in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{path} is a ScriptModule")
    own = {module: vars(module).get("forward") for module in modules}
    for module, path in modules.items():
        module.forward = wrap(module, path)
    try:
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward")
            vars(module).update({"forward": forward} if forward is not None else {})


def traced_call(
    module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], graph: fx.Graph
) -> tuple[Any, bool]:
    """(what a call of a leaf gives, whether its hooks were traced).

    call: makes the leaf's node from (args, kwargs)
    """
    state, last = dict(vars(module)), len(graph.nodes)
    try:
        result = _with_hooks(module, call, args, kwargs)
        if not any(isinstance(value, fx.Proxy) for value in (*vars(module).values(), *module._buffers.values())):
            return result, True
    except Exception:  # hooks are the user's code and may raise anything on proxies
        pass
    for name in set(vars(module)) - set(state):
        del vars(module)[name]
    vars(module).update(state)
    for node in list(reversed(graph.nodes))[: len(graph.nodes) - last]:
        graph.erase_node(node)
    return call(args, kwargs), False


def _with_hooks(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What nn.Module's `__call__` does, with `call` in place of forward."""
    for number, hook in module._forward_pre_hooks.items():
        if number in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            args, kwargs = args if changed is None else changed[0], kwargs if changed is None else changed[1]
        else:
            changed = hook(module, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    result = call(args, kwargs)
    for number, hook in module._forward_hooks.items():
        named = number in module._forward_hooks_with_kwargs
        changed = hook(module, args, kwargs, result) if named else hook(module, args, result)
        result = result if changed is None else changed
    return result


def without_hooks(traced: fx.GraphModule, leaves: set[nn.Module]) -> None:
    """Replaces leaves whose hooks were traced by shallow copies without hooks, in place."""
    bare: dict[nn.Module, nn.Module] = {}
    for leaf in leaves:
        bare[leaf] = copy.copy(leaf)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            vars(bare[leaf])[name] = OrderedDict()
    for owner in list(nn.Module.modules(traced)):
        for name, child in owner._modules.items():
            if child in bare:
                owner._modules[name] = bare[child]

    def needed(node: fx.Node) -> bool:  # torch.fx does not know of methods such as `mul_`, whose value nobody may read
        return node.is_impure() or updates(traced, node)

    traced.graph.eliminate_dead_code(needed)  # what hooks compute and nobody uses
    traced.recompile()
