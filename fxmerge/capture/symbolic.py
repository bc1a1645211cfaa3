"""Symbolic tracing that expands the modules in `EXPANSIONS`, and the choice between it and torch.export."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.capture.constant_fold import fold
from fxmerge.capture.declared_sizes import Shapes, SizesRefusedError
from fxmerge.capture.expand_modules import expansion_of
from fxmerge.capture.frozen import Check, restored
from fxmerge.capture.hooks import hooked, overridden, traced_call, without_hooks
from fxmerge.capture.torch_export import export
from fxmerge.capture.without_rule import without_rule
from fxmerge.errors import FxMergeError, first_line, of_user
from fxmerge.graph.nested import holds_tensors, leaves
from fxmerge.graph.odd_names import writable
from fxmerge.rules.recurrent import PACKING
from fxmerge.weights.copy import deep_copy


class Tracer(fx.Tracer):
    """torch.fx's tracer, which also expands the modules in `EXPANSIONS`.

    For each node it looks up a parameter's name and the user's source line in constant time, where torch.fx searches
    the whole model and formats the whole stack.

    buffers: whether what is computed from buffers alone is in the graph, and not a constant of the run that traced it
    """

    def __init__(self, buffers: bool = False) -> None:
        super().__init__(autowrap_functions=PACKING)
        self.buffers = buffers
        self._autowrap_search.append(torch.nn.utils.rnn)
        self.expanded: set[nn.Module] = set()
        self.unhooked: set[nn.Module] = set()  # leaves whose hooks were traced
        self.names: dict[int, str] = {}  # id of a parameter or buffer -> its first path
        self.made: dict[nn.Module, str] = {}  # leaves that are no submodules of the model -> names in the graph

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        if isinstance(root, nn.Module):
            self.names = {id(v): n for n, v in reversed([*root.named_buffers(), *root.named_parameters()])}
        graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if node.target in PACKING:
                # or the code of the graph would call torch.fx.wrap with a dotted name, which breaks every later trace
                node.meta.pop("is_wrapped", None)
        return graph

    def create_arg(self, a: Any) -> Any:
        name = self.names.get(id(a)) if isinstance(a, Tensor) else None
        return super().create_arg(a) if name is None else self.create_node("get_attr", name, (), {})

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        followed = isinstance(attr_val, Tensor if self.buffers else nn.Parameter)
        name = self.names.get(id(attr_val)) if followed else None
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if node.op not in ("placeholder", "output"):  # these are not created by the user's code
            node.stack_trace = user_line() or node.stack_trace
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.expanded and not overridden(m) and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if m not in (self.submodule_paths or ()) and not [*m.parameters(), *m.buffers()]:
            return self.outside(m, forward, args, kwargs)
        args, kwargs = self.without_zero_state(m, args, kwargs)
        if hooked(m) and self.is_leaf_module(m, self.path_of_module(m)):
            call = super().call_module
            result, traced = traced_call(m, lambda a, k: call(m, forward, a, k), args, kwargs, self.graph)
            self.unhooked |= {m} if traced else set()
            return result
        expansion = expansion_of(m)
        if expansion is not None:
            self.expanded.add(m)
            try:
                with self.undone_if(NotImplementedError):
                    return super().call_module(m, lambda *a, **k: expansion(m, *a, **k), args, kwargs)
            except NotImplementedError:  # the module stays a leaf
                self.expanded.discard(m)
        return super().call_module(m, forward, args, kwargs)

    def outside(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a module without tensors that is no submodule of the model: made in forward, or in a list.

        Its forward is traced, or else, where it is one of torch's that asks for the shapes of its inputs, it is a leaf.
        """
        try:
            with self.undone_if(Exception):
                return forward(*args, **kwargs)
        except Exception:
            if not super().is_leaf_module(m, "") or any(
                isinstance(v, fx.Proxy) for v in leaves(list(vars(m).values()))
            ):
                raise
        name = self.made.setdefault(m, f"{type(m).__name__.lower()}_{len(self.made)}")
        return self.create_proxy("call_module", name, args, kwargs)

    @contextmanager
    def undone_if(self, kinds: type[Exception]) -> Iterator[None]:
        """Erases the nodes that were created in it where it raises an exception of these kinds."""
        stack, last = dict(self.module_stack), len(self.graph.nodes)
        try:
            yield
        except kinds:
            self.module_stack.clear()
            self.module_stack.update(stack)
            for node in list(reversed(self.graph.nodes))[: len(self.graph.nodes) - last]:
                self.graph.erase_node(node)
            raise

    def without_zero_state(
        self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a recurrent layer without an initial state of zeros, which the layer makes itself.

        Such a tensor would be a constant of the graph, of the size of the example's batch.
        """
        given = kwargs.get("hx", args[1] if len(args) > 1 else None)
        states = given if isinstance(given, (tuple, list)) else [given]
        if isinstance(m, (nn.RNNBase, nn.RNNCellBase)) and all(
            type(t) is Tensor and id(t) not in self.names and not bool(t.any()) for t in states
        ):
            return args[:1], {k: v for k, v in kwargs.items() if k != "hx"}
        return args, kwargs


def user_line() -> str:
    """The innermost line of the user's model on the stack, formatted as in a traceback.

    "" where there is none, for example inside an nn.Sequential. The search stops at the call of `capture`, since the
    code that calls fxmerge did not create the node.
    """
    frame = inspect.currentframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith("/fxmerge/capture/capture_model.py"):
            break
        if of_user(path) and not path.startswith("<"):
            code = linecache.getline(path, frame.f_lineno).strip()
            return f'  File "{path}", line {frame.f_lineno}, in {frame.f_code.co_name}\n    {code}\n'
        frame = frame.f_back
    return ""


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], check: Check, shapes: Shapes | None = None,
    symbolically: bool = True,
) -> fx.GraphModule:  # fmt: skip
    """A graph module of the model: traced symbolically, or exported where that leaves fewer calls without a rule, or
    where arguments are tuples, lists or dicts of tensors, each of which then is an input of its own.

    check: raises for a graph that is not faithful to the model; the other tracer is then tried
    shapes: the sizes of inputs that the user declares for an export
    symbolically: whether to trace at all; else the model is exported

    Raises FxMergeError where both fail. The message names the user's source line. Raises SizesRefusedError where the
    model is exported and does not fit the declared sizes.
    """
    if isinstance(model, fx.GraphModule):
        return model
    traced: fx.GraphModule | None = None
    why: Exception = ValueError("its graph is not what the model computes")
    try:
        if symbolically:
            with restored(model):  # tracing leaves proxies in the model, and torch.export fake tensors
                traced = symbolic(model, args, kwargs)
            check(traced)
    except Exception as error:
        traced, why = None, error
    nested = any(map(holds_tensors, (*args, *kwargs.values())))
    if traced is not None and not nested and not without_rule(traced):
        return traced
    try:
        with restored(model):
            exported = export(model, args, kwargs, shapes)
        check(exported)
    except SizesRefusedError:
        raise
    except Exception as error:
        if traced is not None:
            return traced
        raise FxMergeError(
            f"{type(model).__name__} cannot be traced by torch.fx ({first_line(why)}{_where(why)}), "
            f"nor exported by torch.export ({first_line(error)}); move control flow that depends on values into a leaf "
            "submodule, or merge the submodules that can be traced one by one"
        ) from error
    if traced is None:
        return exported
    return exported if without_rule(exported) < without_rule(traced) + nested else traced


def symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The model as traced by torch.fx. Raises whatever tracing raises.

    Arguments that are left out of the call get their defaults, as constants of the graph.
    """
    parameters = inspect.signature(model.forward).parameters
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    left_out = {k: p.default for k, p in parameters.items() if k not in given and p.default is not p.empty}

    def traced(tracer: Tracer) -> fx.GraphModule:
        before = [(m, dict(vars(m))) for m in nn.Module.modules(model)]
        graph = writable(tracer.trace(model, concrete_args=left_out or None))
        for module, fields in before:  # what forward assigned while it was traced is no value that the graph can fetch
            for name, value in list(vars(module).items()):
                if isinstance(value, fx.Proxy):
                    vars(module)[name] = fields.get(name)
        for module, name in tracer.made.items():
            model.add_module(name, module)
        made = fx.GraphModule(model, graph, type(model).__name__)
        for name in tracer.made.values():
            delattr(model, name)
        if tracer.unhooked:
            without_hooks(made, tracer.unhooked)
        return made

    found = traced(Tracer())
    if any(n.op == "get_attr" and str(n.target).startswith("_tensor_constant") for n in found.graph.nodes):
        with suppress(Exception), restored(model):  # a branch on what a buffer holds cannot be traced
            followed = traced(Tracer(buffers=True))
            folded = fold(deep_copy(followed, [*followed.parameters(), *followed.buffers()]))
            if _calls(folded) <= _calls(found):  # else there are places and tables among the buffers, not arithmetic
                return followed
    return found


def _calls(module: fx.GraphModule) -> int:
    return sum(node.op.startswith("call") for node in module.graph.nodes)


def _where(error: Exception) -> str:
    """The innermost line of the user's code in an error's traceback, for a message; "" where there is none."""
    frame, place = error.__traceback__, ""
    while frame is not None:
        path = frame.tb_frame.f_code.co_filename
        if of_user(path):
            place = f" (at {path}:{frame.tb_lineno}, in {frame.tb_frame.f_code.co_name})"
        frame = frame.tb_next
    return place
