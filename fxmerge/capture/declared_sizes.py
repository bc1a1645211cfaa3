"""Sizes of inputs that the user declares with `dynamic_shapes=`, which means what it means for torch.export.

What is declared to vary has to vary: where the model fixes it, or where it must agree with another size, the message
names the input and the axis. What is not declared is as large as in the example.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxmerge.errors import FxMergeError, first_line

Shapes = Mapping[str, Any]  # input -> for a tensor {axis: Dim, a hint or an int} or a list of these; None: all as given
Call = tuple[tuple[Any, ...], dict[str, Any]]

_SIZE = re.compile(r"L\['(\w+)'\]((?:\[\w+\])*)\.size\(\)\[(\d+)\]")
_MARKED = re.compile(r"You marked (.+?) as dynamic but your code specialized it to be a constant \((\d+)\)")


class SizesRefusedError(FxMergeError):
    """Raised for declared sizes that do not fit the model or its inputs."""


def declared(dynamic_shapes: Any, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes | None:
    """`dynamic_shapes` by the names of the inputs, for every input that is given; None for None.

    Raises SizesRefusedError where it names inputs or axes that are not there, or a number that is not the size of the
    example.
    """
    if dynamic_shapes is None:
        return None
    if hasattr(dynamic_shapes, "dynamic_shapes"):  # torch.export.ShapesCollection and AdditionalInputs
        dynamic_shapes = dynamic_shapes.dynamic_shapes(model, args, dict(kwargs))
    given = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    if isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) != len(given):
            raise SizesRefusedError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries, but {len(given)} inputs are given: "
                f"{', '.join(given)}"
            )
        dynamic_shapes = dict(zip(given, dynamic_shapes, strict=True))
    if not isinstance(dynamic_shapes, Mapping):
        raise SizesRefusedError(
            f"dynamic_shapes is a {type(dynamic_shapes).__name__}; give what torch.export.export takes, such as "
            "{'x': {0: torch.export.Dim('batch')}}"
        )
    for name in dynamic_shapes:
        if name not in given:
            raise SizesRefusedError(
                f"dynamic_shapes names the input {name!r}, which is not given; the inputs are {', '.join(given)}"
            )
    shapes = {name: dynamic_shapes.get(name) for name in given}
    for name, value in given.items():
        _check(name, shapes[name], value)
    return shapes


def _check(name: str, shape: Any, value: Any) -> None:
    """Raises SizesRefusedError for a shape that does not fit an input's value, a tensor or nested containers."""
    if shape is None:
        return
    if isinstance(value, Tensor):
        if not isinstance(shape, (Mapping, tuple, list)):
            raise SizesRefusedError(f"dynamic_shapes[{name!r}] is {shape!r}; give {{axis: Dim}}, a list or None")
        if not isinstance(shape, Mapping) and len(shape) != value.dim():
            raise SizesRefusedError(
                f"dynamic_shapes gives {len(shape)} sizes for input {name}, which has {value.dim()} axes"
            )
        for axis, size in _sizes(shape):
            if not isinstance(axis, int) or not 0 <= axis < value.dim():
                raise SizesRefusedError(
                    f"dynamic_shapes names axis {axis!r} of input {name}, which has {value.dim()} axes"
                )
            if isinstance(size, int) and size != value.size(axis):
                raise SizesRefusedError(
                    f"dynamic_shapes says that input {name} (axis {axis}) has the size {size}, but in example_inputs "
                    f"it has {value.size(axis)}"
                )
        return
    if isinstance(value, Mapping) and isinstance(shape, Mapping) and set(shape) <= set(value):
        parts = [(key, shape[key], value[key]) for key in shape]
    elif isinstance(value, (tuple, list)) and isinstance(shape, (tuple, list)) and len(shape) == len(value):
        parts = list(zip(range(len(value)), shape, value, strict=True))
    else:
        raise SizesRefusedError(
            f"dynamic_shapes[{name!r}] is {shape!r}, which does not have the structure of this input, a "
            f"{type(value).__name__}"
        )
    for key, inner, part in parts:
        _check(f"{name}[{key!r}]", inner, part)


def _sizes(shape: Any) -> list[tuple[Any, Any]]:
    """(axis, what is declared of it) for a tensor."""
    return list(shape.items() if isinstance(shape, Mapping) else enumerate(shape or ()))


def doubled(call: Call, forward: Any, shapes: Shapes) -> Call:
    """The example for an export with these shapes: a single sample becomes two, if all inputs let their samples vary.

    torch.export takes a size of 1 as a constant.
    """
    given = inspect.signature(forward).bind(*call[0], **call[1]).arguments
    tensors = [pair for name, value in given.items() for pair in _tensors(shapes.get(name), value)]
    if not tensors or any(value.size(0) != 1 or not _varies(shape) for shape, value in tensors):
        return call
    made: Call = tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() else v, call)
    return made


def _varies(shape: Any) -> bool:
    """Whether the samples of a tensor are declared to vary."""
    return not isinstance(dict(_sizes(shape)).get(0), (int, type(None)))


def _tensors(shape: Any, value: Any) -> Iterator[tuple[Any, Tensor]]:
    """(what is declared of it, tensor), for all tensors of an input that have an axis."""
    if isinstance(value, Tensor):
        if value.dim():
            yield shape, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors((shape or {}).get(key), part)
    elif isinstance(value, (tuple, list)):
        for at, part in enumerate(value):
            yield from _tensors(shape[at] if shape else None, part)


def refused(error: Exception, shapes: Shapes) -> SizesRefusedError | None:
    """What torch.export says against declared sizes, by inputs and axes; None for an error that is not about them."""
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    kind = str(getattr(error, "error_type", "")).rpartition(".")[2]
    if not isinstance(error, ConstraintViolationError) and kind not in ("CONSTRAINT_VIOLATION", "INVALID_INPUT"):
        return None
    places = _places(shapes)

    def named(text: str) -> str:
        text = _SIZE.sub(lambda m: f"input {m[1]}{m[2]} (axis {m[3]})", text)
        return places.get(text, text)

    lines = [line.strip()[2:] for line in str(error).splitlines() if line.strip().startswith("- ")]
    clauses = []
    for line in lines or [first_line(error)]:
        marked = _MARKED.search(line)
        clauses.append(
            f"the model fixes {named(marked[1])} at {marked[2]}, but it is declared to vary" if marked else named(line)
        )
    return SizesRefusedError(
        f"dynamic_shapes does not fit the model: {'; '.join(c.rstrip('.') for c in dict.fromkeys(clauses))}; declare "
        "what can vary"
    )


def _places(shapes: Shapes) -> dict[str, str]:
    """{name of a declared dimension: the inputs and axes that it is declared for}"""
    found: dict[str, list[str]] = {}

    def visit(name: str, shape: Any) -> None:
        for key, size in _sizes(shape):
            if isinstance(size, (Mapping, tuple, list)):
                visit(f"{name}[{key!r}]", size)
            elif (dim := getattr(size, "__name__", None)) is not None:
                found.setdefault(str(dim), []).append(f"input {name} (axis {key})")

    for name, shape in shapes.items():
        visit(name, shape)
    return {dim: " and ".join(places) for dim, places in found.items()}


def differs(name: str) -> SizesRefusedError:
    """The error for a graph that is exported with declared sizes and does not return what the model does."""
    return SizesRefusedError(
        f"with these dynamic_shapes, torch.export makes a graph of {name} that does not return what the model returns "
        "in other sizes; declare fewer sizes, or leave out dynamic_shapes"
    )
