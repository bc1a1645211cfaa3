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

from torch import Tensor, fx

from fxmerge.capture.size_checks import NAME, REMEDY, Allowed, Place, Writer

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_MULTIPLE = re.compile(r"(?:(\d+)\*)?(s\d+)")


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
    symbols = {name for shape in shapes for size in shape or () for name in NAME.findall(str(size))}
    return Sizes(shapes=shapes, limits=limits, guards=[g for g in guards if set(NAME.findall(g)) <= symbols])


def _size(expression: Any, code: Callable[[Any], str]) -> int | str:
    return int(expression) if expression.is_Integer else code(expression)


def multiple_of(size: int | str) -> tuple[int, str] | None:
    """(k, s) for a size that is k times a symbol, as of images whose sizes are multiples of 32; None for others."""
    found = _MULTIPLE.fullmatch(size) if isinstance(size, str) else None
    return (int(found[1] or 1), found[2]) if found else None


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
    first: dict[str, Place] = {}  # symbol -> the first place where a size is that symbol, or else a multiple of it
    for times in (False, True):
        for node, shape in tensors:
            for axis, size in enumerate(shape):
                factor, symbol = multiple_of(size) or (0, "")
                if factor and (factor > 1) == times:
                    first.setdefault(symbol, Place(node, axis, factor))
    writer = Writer(module.graph, placeholders[-1], first)
    for node, shape in tensors:
        writer.shape(node, shape)
    alone, joint = _by_symbols(found.guards)
    allowed = {}
    for symbol in first:
        smallest = 1 if single is None or symbol in single else 2
        allowed[symbol] = _allowed(alone.get(symbol, ()), found.limits.get(symbol, (2, None)), smallest, symbol)
        writer.size(symbol, allowed[symbol])
    for a, b in together:
        said = [f"{first[name].node.name} (axis {first[name].axis})" for name in (a, b)]
        writer.code(f"({a} != 1) | ({b} == 1)", f"inputs {said[0]} and {said[1]} must agree; {REMEDY}", [a, b])
    for guard in joint:
        names = sorted(set(NAME.findall(guard)))
        if not all(n in first for n in names):
            continue
        places = {n: (placeholders.index(first[n].node), first[n]) for n in names}
        fine = [
            eval(guard, {}, {n: inputs[at].size(own.axis) // own.factor for n, (at, own) in places.items()})
            for inputs in proved
        ]
        if all(fine) and not _implied(guard, [allowed[n] for n in names], names):
            writer.code(guard, f"the sizes of the inputs must be as in the example ({guard})", names)
    module.graph.lint()
    module.recompile()


def _by_symbols(guards: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """({symbol: the guards on it alone}, the guards on several symbols)."""
    alone: dict[str, list[str]] = {}
    joint = []
    for guard in dict.fromkeys(guards):
        names = set(NAME.findall(guard))
        if len(names) == 1:
            alone.setdefault(names.pop(), []).append(guard)
        elif names:
            joint.append(guard)
    return alone, joint


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
