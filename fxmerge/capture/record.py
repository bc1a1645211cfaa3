"""Records the graph of one run, for models that neither symbolic tracing nor torch.export can follow.

The model runs on the example inputs. Submodules that can be traced symbolically are *parts*, whose graphs are inserted
once for each call. The code between parts, the *glue*, is recorded call by call as it runs. The result is one graph,
analysed like any other. Only parts are rewritten. Glue remains the user's code: no literal width may be wrong in it.

One run shows one path. Another run may take another one where code reads the value of a tensor (`if x.sum() > 0`), or
where a submodule did not run. All tensors that the code of such a module sees keep their channels.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxmerge.capture.frames import Frame
from fxmerge.capture.frozen import checks
from fxmerge.capture.hooks import hooked, overridden, replaced_forwards
from fxmerge.capture.symbolic import symbolic, user_line
from fxmerge.capture.without_rule import without_rule
from fxmerge.graph.nested import leaves, tree
from fxmerge.graph.odd_names import writable
from fxmerge.graph.ops import HARMLESS, PLAIN, held_tensors, node_call, tensors
from fxmerge.ir.capture import CALLER, Part, Recorded
from fxmerge.rules.lookup import rule_of_module
from fxmerge.rules.movement import enter

Templates = dict[str, fx.GraphModule | None]  # path -> the module's own graph, None if it is not a part


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], templates: Templates | None = None
) -> Recorded:
    """Records one run of a copy of a model, which is changed in place.

    templates: those of an earlier run of the same copy

    Raises whatever the model raises, and TypeError for models with ScriptModules.
    """
    return _Recording(model, {} if templates is None else templates).run(args, kwargs)


class _Recording(TorchFunctionMode):
    def __init__(self, model: nn.Module, templates: Templates) -> None:
        super().__init__()
        self.model, self.graph = model, fx.Graph()
        self.nodes: dict[int, fx.Node] = {}  # id of a tensor -> the node whose value it is
        self.kept: list[Any] = []  # keeps tensors alive, so that no id is used twice
        # id of a parameter or buffer -> its first path
        self.paths = {id(v): n for n, v in reversed([*model.named_buffers(), *model.named_parameters()])}
        self.familiar: set[int] = {id(v) for v in held_tensors(model)}  # ids of the tensors that need no node
        self.templates = templates
        self.parts: dict[str, Part] = {}
        self.rewritable: set[str] = set()  # nodes inserted by parts
        self.frames: list[Frame] = []
        self.doubtful: dict[str, str] = {}  # path of a module -> why another run may take another path
        self.ran: set[str] = set()
        self.seen: dict[str, set[fx.Node]] = {}  # path of a module -> the nodes that its own code sees
        self.off = 0  # while positive, calls are not recorded
        self.constants = 0  # how many tensors were stored as constants

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
        inputs: list[Any] = []
        for value in leaves([args, kwargs]):
            if isinstance(value, Tensor) and id(value) not in self.nodes:
                self._remember(value, self.graph.placeholder(f"input_{len(inputs)}"))
                inputs.append(value)
        root = Frame("", {self.nodes[id(v)] for v in inputs})
        self.frames.append(root)
        with replaced_forwards(self.model, self._wrap), self:
            out = self.model(*args, **kwargs)
        self._close()
        self.graph.output(tree(lambda v: self._node(v) if isinstance(v, Tensor) else v, out))
        self._unvisited()
        held = {n.name: f"is used by {path or 'the model'}, which {self.doubtful[path]}"
                for path, nodes in self.seen.items() if path in self.doubtful for n in nodes}  # fmt: skip
        module = fx.GraphModule(self.model, writable(self.graph), type(self.model).__name__)
        for number in range(self.constants):
            delattr(self.model, f"_recorded_{number}")
        self.graph.lint()
        return Recorded(
            module=module,
            inputs=tuple(inputs),
            host=self.model,
            parts=tuple(self.parts.values()),
            glue=frozenset(n.name for n in self.graph.nodes if n.name not in self.rewritable),
            held=held,
            again=functools.partial(record, self.model, templates=self.templates),
        )

    def _close(self) -> None:
        frame = self.frames.pop()
        self.seen.setdefault(frame.path, set()).update(frame.seen)

    def _unvisited(self) -> None:
        """Marks the modules that have a submodule with parameters that did not run, since another run may run it."""
        inside = tuple(p + "." for p, t in self.templates.items() if t is not None) + tuple(
            p + "." for p in self.ran if p not in self.seen
        )
        fetched = {str(n.target).rpartition(".")[0] for n in self.graph.nodes if n.op == "get_attr"}
        for path, module in self.model.named_modules():
            owns = next(module.parameters(recurse=False), None) is not None and path not in fetched
            if path and owns and path not in self.ran and not path.startswith(inside):
                parent = path.rpartition(".")[0]
                while parent not in self.seen and parent:
                    parent = parent.rpartition(".")[0]
                self.doubtful.setdefault(parent, f"did not run its submodule {path}")

    # --- tensors and nodes

    def _remember(self, value: Tensor, node: fx.Node) -> None:
        self.nodes[id(value)] = node
        self.kept.append(value)

    def _node(self, value: Tensor) -> fx.Node:
        """The node of a tensor. An unknown tensor is fetched if it is a parameter, otherwise stored as a constant."""
        if id(value) in self.nodes:
            return self.nodes[id(value)]
        path = self.paths.get(id(value))
        if path is not None:
            node = self.graph.get_attr(path)
        else:
            name = f"_recorded_{self.constants}"
            self.constants += 1
            setattr(self.model, name, value.detach().clone())
            fetched = self.graph.get_attr(name)
            fetched.meta["constant"] = True
            node = self.graph.call_method("clone", (fetched,))  # cloned, since the code may update it in place
        self._remember(value, node)
        return node

    def _arguments(self, value: Any) -> Any:
        """The arguments of a call with each tensor replaced by its node."""
        return tree(lambda v: self._node(v) if isinstance(v, Tensor) else v, value)

    def _assign(self, given: Any, value: Any) -> None:
        """Notes the node of each tensor in a result; `given` is the node of the result, or a tree of nodes."""
        if isinstance(value, Tensor) and isinstance(given, fx.Node):
            self._remember(value, given)
        elif isinstance(value, (list, tuple)):
            for at, item in enumerate(value):
                part = given[at] if isinstance(given, (list, tuple)) else None
                self._assign(self._item(given, at, item) if part is None else part, item)
        elif isinstance(value, dict):
            for name, item in value.items():
                part = given[name] if isinstance(given, dict) else None
                self._assign(self._item(given, name, item) if part is None else part, item)

    def _item(self, given: fx.Node, at: Any, value: Any) -> fx.Node | None:
        """The node of one item of a result, None for an item without tensors."""
        return self.graph.call_function(operator.getitem, (given, at)) if tensors(value) else None

    # --- functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        operands = tensors([args, kwargs])
        name = getattr(func, "__name__", "")
        name = getattr(func.__self__, "__name__", "") if name == "__get__" else name
        tracked = any(id(t) in self.nodes or id(t) in self.paths for t in operands)
        if not tracked or name in HARMLESS or name == "__set__":
            out = func(*args, **kwargs)
            for t in tensors(out):
                self.familiar.add(id(t))
                self.kept.append(t)
            return out
        frame = self.frames[-1]
        for t in operands:
            if id(t) not in self.nodes and id(t) not in self.paths and id(t) not in self.familiar:
                self.doubtful.setdefault(frame.path, "makes tensors in a way that cannot be recorded")
        op, target, given, named = node_call(func, name, args, kwargs)
        if not all(isinstance(v, (*PLAIN, Tensor)) for v in leaves([given, named])):
            self.doubtful.setdefault(frame.path, f"calls {name} with an argument that cannot be recorded")
            frame.seen.update(self._node(t) for t in operands)
            return func(*args, **kwargs)
        nodes = self._arguments(list(given)), self._arguments(dict(named))
        frame.seen.update(self._node(t) for t in operands)
        out = func(*args, **kwargs)
        node = self.graph.create_node(op, target, tuple(nodes[0]), nodes[1])
        node.meta[CALLER] = frame.path
        node.stack_trace = user_line()
        if isinstance(out, Tensor) or tensors(out):
            self._assign(node, out)
            frame.seen.update(self.nodes[id(t)] for t in tensors(out))
        elif out is not None:
            self.doubtful.setdefault(frame.path, f"reads the value of a tensor ({name})")
        return out

    # --- modules

    def _wrap(self, module: nn.Module, path: str) -> Callable[..., Any]:
        """A forward that records the call: as a leaf, as a part, or (for any other module) as the calls inside it."""
        forward, overrides = module.forward, overridden(module)

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.off:
                return forward(*args, **kwargs)
            self.ran.add(path)
            hooked = module._forward_hooks or module._forward_pre_hooks
            plain = all(isinstance(v, (*PLAIN, Tensor)) for v in leaves([args, kwargs]))
            if not hooked and plain:
                own = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
                if not overrides and (own or rule_of_module(module) is not None):
                    return self._leaf(path, forward, args, kwargs)
                template = self._template(module, path, args, kwargs)
                if template is not None:
                    return self._inline(template, path, forward, args, kwargs)
            frame = Frame(path, {self._node(t) for t in tensors([args, kwargs])})
            self.frames.append(frame)
            out = forward(*args, **kwargs)
            frame.seen.update(self._node(t) for t in tensors(out))
            self._close()
            self.frames[-1].seen.update({self._node(t) for t in tensors([args, kwargs, out])})
            return out

        wrapped.overrides = overrides  # type: ignore[attr-defined]
        return wrapped

    def _unrecorded(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.off += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self.off -= 1

    def _leaf(self, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nodes = self._arguments(list(args)), self._arguments(dict(kwargs))
        out = self._unrecorded(forward, args, kwargs)
        node = self.graph.call_module(path, tuple(nodes[0]), nodes[1])
        node.stack_trace = user_line()
        self._assign(node, out)
        self.frames[-1].seen.update(self._node(t) for t in tensors([args, kwargs, out]))
        return out

    def _template(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> fx.GraphModule | None:
        """The graph of a module that can be a part: traced symbolically, with a rule for each call. Otherwise None."""
        if not all(tensors(v) for v in [*args, *kwargs.values()]):
            return None  # a flag or None may differ in another call
        if path not in self.templates:
            if any(hooked(inner) for inner in nn.Module.modules(module)):  # their hooks run with the part's own leaves
                return None
            self.off += 1
            try:
                traced = symbolic(module, args, kwargs)
                checks(module, module, args, kwargs)(traced)
                self.templates[path] = traced if without_rule(traced) == 0 else None
            except Exception:  # tracing raises many types; the module is then not a part
                self.templates[path] = None
            finally:
                self.off -= 1
        return self.templates[path]

    def _inline(self, template: fx.GraphModule, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Inserts the graph of a part for one call of it."""
        given, named = list(self._arguments(list(args))), self._arguments(dict(kwargs))
        out = self._unrecorded(forward, args, kwargs)
        made: dict[fx.Node, fx.Node] = {}
        entered: list[tuple[str, str, Any]] = []
        result: Any = None
        for node in template.graph.nodes:
            if node.op == "placeholder":
                default = node.args[0] if node.args else None
                value = given.pop(0) if given else named.get(node.target, default)
                made[node] = self.graph.call_function(enter, (value,))
                entered.append((made[node].name, str(node.target), node.args))
            elif node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: made[n])
            else:
                made[node] = self.graph.node_copy(node, lambda n: made[n])
                self.rewritable.add(made[node].name)
                if node.op in ("call_module", "get_attr"):
                    made[node].target = f"{path}.{node.target}"
        self._assign(result, out)
        inside = tuple(n.name for n in made.values())
        if path in self.parts:
            self.parts[path] = replace(self.parts[path], again=(*self.parts[path].again, inside))
        else:
            self.parts[path] = Part(
                path=path,
                class_name=type(self.model.get_submodule(path)).__name__,
                entered=tuple(entered),
                nodes=inside,
                result=result,
            )
        self.frames[-1].seen.update(self._node(t) for t in tensors([args, kwargs, out]))
        return out
