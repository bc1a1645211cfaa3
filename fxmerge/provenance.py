"""Provenance: one run of the graph on labels tells which channel went where.

Every channel that a parameter creates gets a label, and the graph is interpreted on label tensors of the activations'
shapes, one rule for each op (`rules.RULES`). What comes back are facts: ties (labels that must live or die together),
pins (labels that must stay, with the reason and the user's source line), blocks (rows that must lose equally many).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import movement, rules
from .errors import source_line
from .ir import Block, Capture, Lab, Layer, Param, ParamLabels, Pin, Provenance, Tie
from .labels import FIXED, fixed, numbers, simplify, thin, varying


class _Context:
    """What a rule sees of the run, and where it says what it learnt."""

    def __init__(self, run: _Run, node: fx.Node, rule_name: str, target: Any, operands: Sequence[Any]) -> None:
        self._run, self._node, self._operands = run, node, operands
        self.rule_name, self.target = rule_name, target
        self.shape = run.capture.shapes.get(node.name)

    def axis(self, param: Param, axis: int, groups: int = 1) -> Tensor:
        """The labels along one axis of a parameter, made on first sight: (size,), or (groups * size,)."""
        known = self._run.axes.setdefault(param.path, {})
        if axis not in known:
            known[axis] = self._run.new(param.value.size(axis) * groups)
        if groups > 1:
            self._run.groups[param.path] = groups
        if known[axis].numel() != param.value.size(axis) * groups:
            self.freeze(param, "is used with different numbers of groups")
            return torch.zeros(param.value.size(axis) * groups, dtype=torch.int64)
        return known[axis]

    def elements(self, param: Param) -> Tensor:
        """A label for each element of a raw parameter."""
        if param.path not in self._run.elements:
            self._run.elements[param.path] = self._run.new(param.value.numel()).view(param.value.shape)
        return self._run.elements[param.path]

    def along(self, x: Lab, axis: int) -> Tensor:
        """The label at each place along an axis, (size,); what else stands at that place is tied to it."""
        size = x.t.size(axis)
        places = thin(x.t).movedim(axis, 0).flatten(1) if x.t.dim() > 1 else thin(x.t)[:, None]
        if places.size(1) > 1:
            self.tie(places[:, :1].expand_as(places), places)
        return places[:, 0].expand(size).clone()

    def resized(self, x: Lab, shape: Sequence[int]) -> Any:
        """The same labels on another shape of as many axes, where labels do not vary along an axis that changes."""
        small = x.t
        for axis in range(small.dim()):
            if small.dim() == len(shape) and small.size(axis) != shape[axis]:
                if axis in varying(small):
                    return self.unknown("changes the size of the channel axis")
                small = small.narrow(axis, 0, 1)
        return Lab(simplify(torch.broadcast_to(small, tuple(shape))))

    def tie(self, left: Tensor, right: Tensor) -> None:
        left, right = torch.broadcast_tensors(thin(left), thin(right))  # type: ignore[no-untyped-call]
        left, right = left.flatten(), right.flatten()
        for one, other in ((left, right), (right, left)):
            if bool((one == FIXED).any()):
                self.pin(other[one == FIXED], "meets values that are not channels of a layer")
        differ = (left != right) & (left != FIXED) & (right != FIXED)
        if bool(differ.any()):
            self._run.ties.append(Tie(self._node.name, left[differ], right[differ]))

    def pin(self, labels: Tensor, reason: str) -> None:
        found = numbers(labels)
        if found.numel():
            self._run.pins.append(Pin(found, reason, self._node.name, source_line(self._node)))

    def freeze(self, param: Any, reason: str) -> None:
        """This parameter may not change its shape."""
        if isinstance(param, Param):
            self._run.frozen.setdefault(param.path, (f"{param.path} {reason}", self._node))

    def block(self, rows: Tensor) -> None:
        self._run.blocks.append(Block(rows, self._node.name))

    def mix(self, labels: Tensor) -> None:
        self._run.mixers.append((self._node.name, numbers(labels)))

    def layer(self, op: str, params: dict[str, str], **facts: Any) -> None:
        name = str(self._node.target) if self._node.op == "call_module" else next(iter(params.values()), "")
        if self._node.op != "call_module":
            name = name.removesuffix(".weight") or name
        self._run.layers.append(Layer(self._node.name, name or self._node.name, op, params, **facts))

    def query(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """A shape, a dtype, a device: read off the operand; a dtype or device off what the example run showed."""
        if self.target is getattr and isinstance(x, Lab):
            name, source = args[0], self._node.args[0]
            if name in ("dtype", "device") and isinstance(source, fx.Node):
                found = getattr(self._run.capture, name + "s").get(source.name)
                return found if found is not None else self.unknown(f"asks for .{name}")
            if name not in ("shape", "ndim", "is_cuda", "requires_grad", "itemsize", "layout", "T", "mT"):
                return self.unknown(f"asks for .{name}")
            out = getattr(x.t, name)
            return Lab(simplify(out)) if isinstance(out, Tensor) else out
        plain = x.t if isinstance(x, Lab) else x.value if isinstance(x, Param) else x
        return movement.run(self.target, (plain, *args), kwargs)

    def unknown(self, why: str = "has no rule") -> Any:
        """Pin all that this op touches; what it gives holds no channels."""
        called = self._node.target if isinstance(self._node.target, str) else _name(self._node.target)
        reason = f"{called} {why}" if why.split(" ")[0] in _VERBS else f"{called}: {why}"
        for operand in movement.leaves(list(self._operands)):
            if isinstance(operand, Lab):
                self.pin(operand.t, reason)
            elif isinstance(operand, Param):
                self.freeze(operand, f"is used by {called}, which {why}")
        if self._node.op == "call_module":
            owner = self._run.capture.module.get_submodule(str(self._node.target))
            for name, value in [*owner.named_parameters(), *owner.named_buffers()]:
                self.freeze(Param(f"{self._node.target}.{name}", value), f"belongs to {called}, which {why}")
        shape = self.shape
        return Lab(fixed(shape)) if shape is not None else _Opaque()


_VERBS = {"has", "takes", "gives", "changes", "reduces", "is", "does", "meets", "spreads", "joins", "asks", "maps"}


class _Opaque:
    """What an op without a rule gave when it was no single tensor; whatever takes it apart has no rule either."""


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)


class _Run:
    """The interpreter: walks the graph once, one rule a node."""

    def __init__(self, capture: Capture) -> None:
        self.capture, self.table = capture, rules.table()
        self.count = 1
        self.axes: dict[str, dict[int, Tensor]] = {}
        self.elements: dict[str, Tensor] = {}
        self.groups: dict[str, int] = {}
        self.frozen: dict[str, tuple[str, fx.Node]] = {}
        self.ties: list[Tie] = []
        self.pins: list[Pin] = []
        self.blocks: list[Block] = []
        self.mixers: list[tuple[str, Tensor]] = []
        self.layers: list[Layer] = []
        self.kinds: dict[str, Any] = {}
        self.commutes: dict[str, bool] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.owners: dict[int, str] = {}  # identity of a parameter -> the one path that stands for it
        self.values: dict[fx.Node, Any] = {}
        self.renewed: dict[fx.Node, fx.Node] = {}  # a node -> the node that last updated its value in place

    def new(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)

    def param(self, path: str, value: Tensor) -> Param:
        """Shared parameters are one: the first path that names the tensor stands for all."""
        return Param(self.owners.setdefault(id(value), path), value)

    def run(self) -> Provenance:
        for node in self.capture.module.graph.nodes:
            self.values[node] = self.step(node)
        return self.facts()

    def latest(self, node: fx.Node) -> fx.Node:
        while node in self.renewed:
            node = self.renewed[node]
        return node

    def step(self, node: fx.Node) -> Any:
        sources = [self.latest(n) for n in node.all_input_nodes]
        self.sources[node.name] = tuple(n.name for n in sources)
        if node.op == "placeholder":
            self.kinds[node.name] = "input"
            shape = self.capture.shapes.get(node.name)
            return Lab(fixed(shape)) if shape is not None else self.capture.args[len(self.values)]
        if node.op == "get_attr":
            value = _attribute(self.capture.module, str(node.target))
            self.kinds[node.name] = "query"
            return self.param(str(node.target), value) if isinstance(value, Tensor) else value

        def operand(value: Any) -> Any:
            return self.values[self.latest(value)] if isinstance(value, fx.Node) else value

        args, kwargs = movement.tree(operand, list(node.args)), movement.tree(operand, dict(node.kwargs))
        if node.op == "output":
            self.kinds[node.name] = "output"
            ctx = _Context(self, node, "output", None, args)
            for leaf in movement.leaves(args):
                if isinstance(leaf, Lab):
                    ctx.pin(leaf.t, "is the model's output")
                elif isinstance(leaf, Param):
                    ctx.freeze(leaf, "is the model's output")
            return None
        return self.call(node, args, kwargs)

    def call(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Find the node's row and run it; without one, everything that the node touches is pinned."""
        target: Any = node.target
        key, why = target, "has no rule"
        if node.op == "call_module":
            target = self.capture.module.get_submodule(str(node.target))
            key = rules.module_class(target, self.table)
            if target._forward_hooks or target._forward_pre_hooks:
                key, why = None, "has forward hooks"
            elif nn.utils.parametrize.is_parametrized(target):
                key, why = None, "has parametrized weights"
            elif key is None:
                why = f"is a {type(target).__name__}, which has no rule"
        found = self.table.get(key) or self.table.get(rules.dotted(target))
        operands = [*args, *kwargs.values()]
        ctx = _Context(self, node, found[0].name if found else str(node.target), target, operands)
        dynamic = any(isinstance(leaf, (Lab, Param, _Opaque)) for leaf in movement.leaves(operands))
        if not dynamic and node.op != "call_module":
            self.kinds[node.name] = "query"
            return movement.run(target, tuple(args), kwargs)  # a plain value: computed as it stands
        self.kinds[node.name] = "unknown"
        if found is None or any(isinstance(leaf, _Opaque) for leaf in movement.leaves(operands)):
            return ctx.unknown(why)
        rule, spelling = found
        for attribute in getattr(spelling, "attributes", ()):
            value = getattr(target, attribute)
            is_tensor = isinstance(value, Tensor)
            kwargs[attribute] = self.param(f"{node.target}.{attribute}", value) if is_tensor else value
        if getattr(target, "padding_mode", "zeros") != "zeros":
            kwargs.pop("padding", None)
        pins = len(self.pins)
        try:
            out = rule.apply(ctx, *args, **kwargs)
        except (TypeError, IndexError, RuntimeError, ValueError) as error:
            del self.pins[pins:]
            return ctx.unknown(f"is called in a way that its rule does not know ({error})")
        self.kinds[node.name] = rule.kind
        commutes = rule.commutes
        self.commutes[node.name] = bool(commutes(ctx, *args, **kwargs) if callable(commutes) else commutes)
        if _in_place(node, target) and node.args and isinstance(node.args[0], fx.Node):
            self.renewed[self.latest(node.args[0])] = node
        return out

    def facts(self) -> Provenance:
        params = {}
        for path in sorted({*self.axes, *self.elements}):
            labels = ParamLabels(path, self.axes.get(path, {}), self.elements.get(path), self.groups.get(path, 1))
            params[path] = labels
            reason, node = self.frozen.get(path, ("", None))
            if path in self.axes and path in self.elements:
                reason = f"{path} is used both as a weight and element by element"
            if reason:
                held = [*labels.axes.values(), *([labels.elements] if labels.elements is not None else [])]
                everything = torch.cat([t.flatten() for t in held])
                where = source_line(node) if node is not None else ""
                self.pins.append(Pin(numbers(everything), reason, node.name if node else "", where))
        stands = {n.name: v.t for n, v in self.values.items() if isinstance(v, Lab)}
        values = {n.name: v for n, v in self.values.items() if not isinstance(v, (Lab, _Opaque))}
        return Provenance(
            stands, values, self.kinds, self.sources, self.commutes, tuple(self.layers), params, tuple(self.ties),
            tuple(self.pins), tuple(self.blocks), tuple(self.mixers), self.count,
        )  # fmt: skip


def _in_place(node: fx.Node, target: Any) -> bool:
    """Does the call update its first argument, so that later readers of that argument see the result?"""
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False))
    if node.kwargs.get("inplace"):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in ("iadd", "isub", "imul", "itruediv")


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def provenance(capture: Capture) -> Provenance:
    """Run a captured graph on labels.

    Cost: one pass of integer arithmetic on label tensors, whose spatial axes have stride 0. Raises nothing: whatever
    has no rule is pinned, and the pin says why.
    """
    return _Run(capture).run()
