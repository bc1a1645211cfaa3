"""Write the nodes of a graph as the lines of a readable `forward`.

A value that is used for the last time passes its name on to the result, so that a chain reads `x = self.conv1(x)`. A
call whose only user is the next node is written inside that node's call. The order of evaluation is that of the graph.
"""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge.errors import FxMergeError, source_line
from fxmerge.export.source.containers import is_attribute, reached
from fxmerge.export.source.names import TOKEN, literal, named, token
from fxmerge.graph.inputs import pytree_codegen
from fxmerge.graph.ops import overload_name

_NESTED = 3  # depth of nested calls, at most
_INLINE = 88  # characters of an expression that is written inside another, at most
LIBRARIES = ("torch", "torchvision", "timm")

_INFIX: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
_INPLACE: dict[Any, str] = {
    operator.iadd: "+=", operator.isub: "-=", operator.imul: "*=", operator.itruediv: "/=",
}  # fmt: skip
_ATEN_INFIX = {
    "add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/", "matmul.default": "@",
    "ge.Scalar": ">=", "le.Scalar": "<=", "gt.Scalar": ">", "lt.Scalar": "<", "bitwise_and.Tensor": "&",
}  # fmt: skip
_HOLDERS = (torch.fft, torch.linalg, torch.special)  # their functions have names such as fft_rfft
_END = 2**63 - 1  # aten's "to the end"
_USUAL = (("pin_memory", False), ("layout", torch.strided))  # arguments of factory functions that can be left out


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of code: how deep its calls are nested, and whether it needs parentheses inside another."""

    code: str
    depth: int = 0
    infix: bool = False

    def tight(self) -> str:
        return f"({self.code})" if self.infix else self.code

    @property
    def is_token(self) -> bool:
        return re.fullmatch(TOKEN, self.code) is not None


class Body:
    """The signature and the lines of one graph's `forward`, and the imports that they need besides torch.

    plain: write aten ops as methods, functions and operators of torch where these exist
    Raises FxMergeError for a call of a function from outside torch, torchvision and timm.
    """

    def __init__(self, module: fx.GraphModule, plain: bool = True) -> None:
        self.module, self.plain = module, plain
        self.imports: set[str] = set()
        self.signature: list[str] = []
        self.names: dict[fx.Node, Text] = {}
        self._lines: list[tuple[str, str]] = []  # (the value that it assigns or "", code); values are tokens
        self._pending: tuple[fx.Node, Text] | None = None
        self._enter([n for n in module.graph.nodes if n.op == "placeholder"])
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self.names[node] = Text(reached("self", module, str(node.target)))
            elif node.op == "output":
                self._take(node)
                self._lines.append(("", f"return {self._text(self._tree(node.args[0]))}"))
            elif node.op != "placeholder":
                self._step(node)
        self.lines = named(self._lines, [re.match(r"\w+", s.lstrip("*"))[0] for s in self.signature])  # type: ignore[index]

    def _enter(self, placeholders: list[fx.Node]) -> None:
        """Collect the parameters of `forward`, and the code that takes each placeholder from them."""
        codegen = pytree_codegen(self.module)
        if codegen is None:
            for node in placeholders:
                default = f"={self._text(node.args[0])}" if node.args else ""
                self.signature.append(str(node.target) + default)
                self.names[node] = Text(token(str(node.target).lstrip("*")))
            return
        info = codegen.pytree_info
        args, kwargs = pytree.tree_unflatten([_Leaf(p) for p in placeholders], info.in_spec)
        for base, value in (dict(zip(info.orig_args, args, strict=False)) | kwargs).items():
            self.signature.append(base)
            for node, path in _paths(value, token(base)):
                self.names[node] = Text(path)

    def _tree(self, value: Any) -> Any:
        """What the graph returns, in the containers that the model returned it in."""
        codegen = pytree_codegen(self.module)
        if codegen is None or codegen.pytree_info.out_spec is None:
            return value
        leaves = list(value) if isinstance(value, (list, tuple)) else [value]
        return pytree.tree_unflatten([_Leaf(v) for v in leaves], codegen.pytree_info.out_spec)

    def _step(self, node: fx.Node) -> None:
        self._take(node)
        if node.target in _INPLACE and isinstance(node.args[0], fx.Node) and self.names[node.args[0]].is_token:
            left = self.names[node.args[0]]
            self._lines.append(("", f"{left.code} {_INPLACE[node.target]} {self._text(node.args[1])}"))
            self.names[node] = left
            return
        self._pending = (node, self._expression(node))
        if not node.users:
            self._flush()

    def _take(self, node: fx.Node) -> None:
        """Write the pending value into the call of this node if it is short and used only there, else as a line."""
        if self._pending is not None:
            before, text = self._pending
            once = len(before.users) == 1 and _operands(node).count(before) == 1
            short = len(text.code) <= _INLINE and (text.depth < _NESTED or node.op == "output")
            if once and short and node.target not in _INPLACE:
                self.names[before], self._pending = text, None
            self._flush()

    def _flush(self) -> None:
        """Give the pending value a line and a name of its own."""
        if self._pending is not None:
            node, text = self._pending
            self._pending, self.names[node] = None, Text(token(node.name) if node.users else "")
            self._lines.append((self.names[node].code, text.code))

    def _text(self, value: Any) -> str:
        """A value as code, with nodes replaced by their names."""
        value = value.value if isinstance(value, _Leaf) else value
        if isinstance(value, fx.Node):
            return self.names[value].code
        if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{literal(k)}: {self._text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, tuple):
            inner = ", ".join(map(self._text, value))
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, slice):
            parts = [self._text(v) for v in (value.start, value.stop, value.step)]
            return f"slice({', '.join(parts)})"
        return literal(value)

    def _expression(self, node: fx.Node) -> Text:
        target: Any = node.target
        args, kwargs = list(node.args), dict(node.kwargs)
        depth = 1 + max((self.names[n].depth for n in node.all_input_nodes), default=0)
        if isinstance(target, torch._ops.OpOverload):
            sign = _ATEN_INFIX.get(target.__name__) if self.plain and len(args) == 2 and not kwargs else None
            if sign is not None:
                return self._infix(sign, args, depth)
            code = self._aten(node, target, args, kwargs)
        elif node.op == "call_module":
            code = f"{reached('self', self.module, str(target))}({self._given(args, kwargs)})"
        elif node.op == "call_method":
            code = f"{self._tight(args[0])}.{target}({self._given(args[1:], kwargs)})"
        elif target is builtins.getattr and len(args) == 2 and is_attribute(str(args[1])):
            code = f"{self._tight(args[0])}.{args[1]}"
        elif target is operator.getitem:
            code = f"{self._tight(args[0])}[{self._index(args[1])}]"
        elif target in _INFIX:
            return self._infix(_INFIX[target], args, depth)
        else:
            kwargs = {k: v for k, v in kwargs.items() if (k, v) not in _defaults(target)}
            code = f"{self._function(node)}({self._given(args, kwargs)})"
        return Text(code, depth)

    def _infix(self, sign: str, operands: list[Any], depth: int) -> Text:
        left, right = map(self._tight, operands)
        return Text(f"{left} {sign} {right}", depth, True)

    def _aten(self, node: fx.Node, target: Any, args: list[Any], kwargs: dict[str, Any]) -> str:
        name, spelled = overload_name(target) or "", f"torch.ops.{target.namespace}.{target.__name__}"
        if name == "transformers::grouped_mm_fallback":  # rows that are sorted by expert times the expert's matrix
            x, matrices, ends = map(self._tight, (*args, *kwargs.values()))
            parts = f"{x}.tensor_split({ends}[:-1].long().cpu())"
            return f"torch.cat([rows @ matrix for rows, matrix in zip({parts}, {matrices})])"
        if target.namespace != "aten":
            raise _unwritable(node, f"calls {spelled}, which is not part of torch")
        if self.plain and not target._schema.is_mutable:
            kwargs = {k: v for k, v in kwargs.items() if (k, v) not in _USUAL}
            if target is torch.ops.aten.index.Tensor:
                places = tuple(slice(None) if place is None else place for place in args[1])
                return f"{self._tight(args[0])}[{self._index(places)}]"
            if name == "sym_size" and len(args) == 2:
                return f"{self._tight(args[0])}.shape[{args[1]}]"
            if target is torch.ops.aten.slice.Tensor and 3 <= len(args) <= 4 and args[1] >= 0:
                stop = None if args[3:] in ([], [_END]) else args[3]
                return (
                    f"{self._tight(args[0])}[{self._index((*[slice(None)] * args[1], slice(args[2] or None, stop)))}]"
                )
            given = target._schema.arguments
            if args and isinstance(args[0], fx.Node) and given[0].name == "self" and hasattr(Tensor, name):
                return f"{self._tight(args[0])}.{name}({self._given(args[1:], kwargs)})"
            spelled = f"F.{name}" if hasattr(F, name) else f"torch.{name}" if hasattr(torch, name) else spelled
        return f"{spelled}({self._given(args, kwargs)})"

    def _function(self, node: fx.Node) -> str:
        """The name of the called function, whose import is added to `imports`."""
        target: Any = node.target
        name = getattr(target, "__name__", "")
        for holder, spelled in ((F, "F"), (torch, "torch"), (math, "math"), (operator, "operator"), (builtins, "")):
            if name and getattr(holder, name, None) is target:
                if spelled in ("math", "operator"):
                    self.imports.add(f"import {spelled}")
                return f"{spelled}.{name}".lstrip(".")
        for holder in _HOLDERS:
            short = name.removeprefix(holder.__name__.rpartition(".")[2] + "_")
            if getattr(holder, short, None) is target:
                return f"{holder.__name__}.{short}"
        for method in (name, name.removesuffix("_")):
            if getattr(Tensor, method, None) is target:
                return f"torch.Tensor.{method}"
        home = getattr(target, "__module__", None) or ""
        if home.split(".")[0] in LIBRARIES and name.isidentifier():
            public = home if not home.startswith(("torch._C", "torch.ops")) else ""
            if public:
                self.imports.add(f"from {public} import {name}")
                return str(name)
        called = f"{home}.{name or target!r}"
        raise _unwritable(node, f"calls {called}, which is not a public function of torch, torchvision or timm")

    def _tight(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value].tight()
        text = self._text(value)
        return f"({text})" if text.startswith("-") else text

    def _index(self, index: Any) -> str:
        parts = list(index) if isinstance(index, tuple) and index else [index]
        return ", ".join(self._slice(p) if isinstance(p, slice) else self._text(p) for p in parts)

    def _slice(self, part: slice) -> str:
        start, stop = ("" if v is None else self._text(v) for v in (part.start, part.stop))
        return f"{start}:{stop}" + ("" if part.step is None else f":{self._text(part.step)}")

    def _given(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        return ", ".join([*map(self._text, args), *(f"{k}={self._text(v)}" for k, v in kwargs.items())])


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A node or a constant inside the containers of an input or output."""

    value: Any


def _paths(value: Any, base: str) -> Iterator[tuple[fx.Node, str]]:
    """Each leaf of an argument with the code that takes it from the argument."""
    if isinstance(value, _Leaf):
        yield value.value, base
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths(inner, f"{base}[{literal(key)}]")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _paths(inner, f"{base}[{number}]")
    else:
        raise FxMergeError(f"an input of type {type(value).__name__} cannot be written to a model.py")


def _defaults(target: Any) -> list[tuple[str, Any]]:
    """(parameter, default) of a function; none if its signature is not known."""
    try:
        return [(p.name, p.default) for p in inspect.signature(target).parameters.values()]
    except (TypeError, ValueError):
        return []


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, each as often as it occurs."""
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]


def _unwritable(node: fx.Node, why: str) -> FxMergeError:
    return FxMergeError(f"{source_line(node) or node.name} {why}")
