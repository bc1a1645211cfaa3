"""The sizes of inputs for which an exported graph holds, as assertions at the start of the graph.

torch.export follows one path through the model's code. It takes a size as a number where the code needs one, and
records the conditions on sizes under which the path is the same. On an input of another size, the graph might run and
return something else than the model. The assertions turn that into an error that names the input, the axis and the
sizes that are allowed. They need only torch, so that generated code holds them as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxmerge.capture.bitwise import Bitwise
from fxmerge.ir.capture import SIZE_CHECK

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# no comma outside of brackets: the writer of model.py breaks lines there
_REMEDY = "to use other sizes give fxmerge example inputs of these"
_NAME = re.compile(r"\bs\d+\b")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What torch.export found about the sizes of a program's inputs.

    shapes:     for each input: its sizes as ints, or as code in symbols, such as s0 or 2*s0; None for others
    limits:     {symbol: (smallest, largest or None)}
    guards:     further conditions, as code in symbols
    """

    shapes: Sequence[Sequence[int | str] | None]
    limits: Mapping[str, tuple[int, int | None]]
    guards: Sequence[str]


def sizes_of(program: ExportedProgram) -> Sizes:
    """What torch.export found about the sizes of a program's inputs."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._sympy.printers import PythonPrinter

    def code(expression: Any) -> str:
        return str(PythonPrinter().doprint(expression))

    inputs = user_inputs(program)
    values = [node.meta.get("val") for node in inputs]
    shapes = [
        [n if isinstance(n, int) else _size(n.node.expr, code) for n in v.shape] if isinstance(v, Tensor) else None
        for v in values
    ]
    limits = {
        str(symbol): (int(found.lower), int(found.upper) if found.upper.is_Integer else None)
        for symbol, found in program.range_constraints.items()
        if found.lower.is_Integer
    }
    modes = [v.fake_mode for v in values if isinstance(v, FakeTensor)]
    environment = modes[0].shape_env if modes else None
    guards = [code(guard.expr) for guard in getattr(environment, "guards", ())]
    place = {
        f"L['{node.name}'].size()[{axis}]": str(size)
        for node, shape in zip(inputs, shapes, strict=True)
        for axis, size in enumerate(shape or ())
    }
    loaded = (
        [] if guards else getattr(program, "_guards_code", None) or []
    )  # a program loaded from a file has these only
    for text in loaded:
        for spelled, size in place.items():
            text = text.replace(spelled, f"({size})")
        guards += [] if "L[" in text else [text]
    symbols = {name for shape in shapes for size in shape or () for name in _NAME.findall(str(size))}
    return Sizes(shapes=shapes, limits=limits, guards=[g for g in guards if set(_NAME.findall(g)) <= symbols])


def _size(expression: Any, code: Callable[[Any], str]) -> int | str:
    return int(expression) if expression.is_Integer else code(expression)


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of a program's graph that are inputs of the user's call, in order."""
    from torch.export.graph_signature import InputKind

    names = [getattr(s.arg, "name", "") for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name] for name in names if name in nodes]


def insert(
    module: fx.GraphModule,
    found: Sizes,
    single: Container[str] | None = None,
    proved: Sequence[Sequence[Any]] = (),
    together: Sequence[tuple[str, str]] = (),
) -> None:
    """Puts assertions about its inputs' sizes at the start of an exported graph, in place.

    single: the symbols that may be 1, if torch.export knows no lower limit for them; None for all
    proved: inputs on which the graph returned what the model returns; no condition on several sizes may exclude them,
        as those do by which torch.export tells a size of 1 from all others
    together: (a symbol, another that has to be 1 if the first is)
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(found.shapes):
        return
    tensors = [(node, shape) for node, shape in zip(placeholders, found.shapes, strict=True) if shape is not None]
    first: dict[str, tuple[fx.Node, int]] = {}  # symbol -> the first place where a size is that symbol
    for node, shape in tensors:
        for axis, size in enumerate(shape):
            if isinstance(size, str) and _NAME.fullmatch(size):
                first.setdefault(size, (node, axis))
    writer = _Writer(module.graph, placeholders[-1], first)
    for node, shape in tensors:
        writer.shape(node, shape)
    alone, joint = _by_symbols(found.guards)
    allowed = {}
    for symbol in first:
        smallest = 1 if single is None or symbol in single else 2
        allowed[symbol] = _allowed(alone.get(symbol, ()), found.limits.get(symbol, (2, None)), smallest, symbol)
        writer.size(symbol, allowed[symbol])
    for a, b in together:
        said = [f"{first[name][0].name} (axis {first[name][1]})" for name in (a, b)]
        writer.code(f"({a} != 1) | ({b} == 1)", f"inputs {said[0]} and {said[1]} must agree; {_REMEDY}", [a, b])
    for guard in joint:
        names = sorted(set(_NAME.findall(guard)))
        if not all(n in first for n in names):
            continue
        places = {n: (placeholders.index(first[n][0]), first[n][1]) for n in names}
        fine = [eval(guard, {}, {n: inputs[at].size(axis) for n, (at, axis) in places.items()}) for inputs in proved]
        if all(fine) and not _implied(guard, [allowed[n] for n in names], names):
            writer.code(guard, f"the sizes of the inputs must be as in the example ({guard})", names)
    module.graph.lint()
    module.recompile()


def _by_symbols(guards: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """({symbol: the guards on it alone}, the guards on several symbols)."""
    alone: dict[str, list[str]] = {}
    joint = []
    for guard in dict.fromkeys(guards):
        names = set(_NAME.findall(guard))
        if len(names) == 1:
            alone.setdefault(names.pop(), []).append(guard)
        elif names:
            joint.append(guard)
    return alone, joint


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """The sizes from `low` to `high` whose remainder by `step` is that of `low`, if they fulfil `guards` too."""

    low: int
    high: int | None
    step: int = 1
    guards: Sequence[str] = ()


def _allowed(guards: Sequence[str], limits: tuple[int, int | None], smallest: int, symbol: str) -> Allowed:
    """The sizes that fulfil guards on one symbol, tried up to well beyond each number in the guards."""
    low, high = limits
    low = smallest if low <= 2 else low
    last = max([256, 2 * low, *(4 * int(n) for g in guards for n in re.findall(r"\b\d+", g))])
    last = min(last, high or last, 1 << 14)

    def fitting(guards: Sequence[str]) -> list[int]:
        tests = [compile(guard, "guard", "eval") for guard in guards]
        return [n for n in range(low, last + 1) if all(eval(test, {}, {symbol: n}) for test in tests)]

    fits, needed = fitting(guards), list(guards)
    steps = {b - a for a, b in itertools.pairwise(fits)}
    if fits and len(steps) <= 1:
        step = steps.pop() if steps else 1
        most = fits[-1] if last == high or fits[-1] + step <= last else high  # beyond what was tried, all fit
        return Allowed(low=fits[0], high=most, step=step)
    for guard in guards:  # those that follow from the others are left out
        fewer = [g for g in needed if g != guard]
        needed = fewer if fitting(fewer) == fits else needed
    return Allowed(low=low, high=high, guards=needed)


def _implied(guard: str, allowed: Sequence[Allowed], names: Sequence[str]) -> bool:
    """Whether a guard on several symbols holds for all small allowed sizes, and so says nothing new."""
    test = compile(guard, "guard", "eval")
    tried = [
        [n for n in range(a.low, min(a.high or 1 << 20, a.low + 40 * a.step) + 1, a.step) if _fits(a, name, n)]
        for a, name in zip(allowed, names, strict=True)
    ]
    return len(names) < 3 and all(eval(test, {}, dict(zip(names, c, strict=True))) for c in itertools.product(*tried))


def _fits(allowed: Allowed, symbol: str, size: int) -> bool:
    return all(eval(guard, {}, {symbol: size}) for guard in allowed.guards)


class _Writer:
    """Writes assertions after the placeholders of a graph."""

    def __init__(self, graph: fx.Graph, after: fx.Node, first: Mapping[str, tuple[fx.Node, int]]) -> None:
        self.graph, self.first = graph, first
        self.before = after.next

    def shape(self, node: fx.Node, shape: Sequence[int | str]) -> None:
        """Asserts the sizes of one input that are numbers, and those that follow from other sizes."""
        names = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        start = names[-1] + 1 if names else 0  # from here on, all sizes are numbers
        said = ", ".join("any" if isinstance(n, str) else str(n) for n in shape) + ("," if len(shape) == 1 else "")
        message = f"input {node.name} must have the shape ({said}); {_REMEDY}"

        def whole(x: fx.Proxy) -> Any:
            sizes: Any = x.shape
            return (sizes if start == 0 else sizes[start:]) == tuple(shape[start:])

        if start < len(shape) or not shape:
            self._assert(lambda: whole(fx.Proxy(node)), message)
        for axis, size in enumerate(shape[:start]):
            if isinstance(size, int):
                self._assert(lambda a=axis, n=size: self._size(node, a) == n, message)  # type: ignore[misc]
            elif self.first.get(size) != (node, axis):
                said = f"input {node.name} (axis {axis}) must agree with the other inputs as in the example"
                self.code(f"{node.name}_size == {size}", f"{said}; {_REMEDY}", _NAME.findall(size), (node, axis))

    def size(self, symbol: str, allowed: Allowed) -> None:
        """Asserts the limits of one symbol, at the first place where it is the size of an input."""
        node, axis = self.first[symbol]
        said = f"input {node.name} (axis {axis}) must have a size that is "

        def here() -> Any:
            return self._size(node, axis)

        if allowed.high == allowed.low:
            self._assert(lambda: here() == allowed.low, f"{said}{allowed.low}; {_REMEDY}")
            return
        if allowed.low > 1:
            self._assert(lambda: here() >= allowed.low, f"{said}at least {allowed.low}; {_REMEDY}")
        if allowed.high is not None:
            self._assert(lambda: here() <= allowed.high, f"{said}at most {allowed.high}; {_REMEDY}")
        if allowed.step > 1:
            rest = allowed.low % allowed.step
            what = f"a multiple of {allowed.step}" + (f" plus {rest}" if rest else "")
            self._assert(lambda: here() % allowed.step == rest, f"{said}{what}; {_REMEDY}")
        for guard in allowed.guards:
            self.code(guard, f"{said}an {symbol} for which {guard}; {_REMEDY}", [symbol])

    def code(self, text: str, message: str, names: Sequence[str], size: tuple[fx.Node, int] | None = None) -> None:
        """Asserts a condition that is written as code in symbols.

        size: an input and the axis whose size the code calls `NAME_size`
        """

        def condition() -> Any:
            known = {name: self._size(*self.first[name]) for name in names}
            if size is not None:
                known[f"{size[0].name}_size"] = self._size(*size)
            code = compile(Bitwise.of(text), "guard", "eval")
            return eval(code, {"math": __import__("math"), "torch": torch}, known)

        self._assert(condition, message)

    def _size(self, node: fx.Node, axis: int) -> Any:
        sizes: Any = fx.Proxy(node).shape
        return sizes[axis]

    def _assert(self, condition: Callable[[], Any], message: str) -> None:
        with self.graph.inserting_before(self.before):
            made = condition()
            self.graph.call_function(torch._assert, (made.node, message)).meta[SIZE_CHECK] = True
