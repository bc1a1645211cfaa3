"""Programs: a merged model as an ExportedProgram, a .pt2 file, an ONNX file; and a .pt2 file as a model."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.capture.torch_export import silence
from fxmerge.errors import FxMergeError, first_line
from fxmerge.weights.files import write

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def dynamic(program: ExportedProgram | None) -> Any:
    """The dynamic shapes of an exported program, by the names of its inputs, as torch.export.export takes them."""
    if program is None:
        return None
    from torch.export import Dim

    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    known: dict[str, Any] = {}

    def size(value: Any) -> Any:
        symbol = value.node.expr
        if not symbol.is_Symbol:
            return Dim.AUTO  # a size that follows from others
        if str(symbol) not in known:
            limits = program.range_constraints.get(symbol)
            low, high = (
                (int(v) if v.is_Integer else None for v in (limits.lower, limits.upper)) if limits else (None,) * 2
            )
            known[str(symbol)] = Dim(str(symbol), **({"min": low} if low else {}), **({"max": high} if high else {}))
        return known[str(symbol)]

    def shape(name: Any) -> Any:
        value = nodes[name].meta["val"] if name in nodes else None
        sizes = enumerate(value.shape) if isinstance(value, Tensor) else ()
        return {axis: size(s) for axis, s in sizes if isinstance(s, torch.SymInt)} or None

    args, kwargs = program.example_inputs or ((), {})
    flat, spec = pytree.tree_flatten((args, kwargs))
    args, kwargs = pytree.tree_unflatten([shape(n) for n in program.graph_signature.user_inputs[: len(flat)]], spec)
    found = dict(zip(inspect.signature(program.module().forward).parameters, args, strict=False)) | kwargs
    return found if known else None


def exported(module: nn.Module, args: tuple[Any, ...], kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    """The module as an ExportedProgram. Raises FxMergeError with torch.export's reason."""
    try:
        with silence(), torch.no_grad():
            return torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise FxMergeError(
            f"torch.export cannot export the merged model: {first_line(error)}; give it other dynamic_shapes"
        ) from error


def save(program: ExportedProgram, path: Path) -> None:
    """Write a .pt2 file, whole or not at all."""

    def fill(there: Path) -> None:
        with there.open("wb") as file:
            torch.export.save(program, file)

    write(path, fill)


def load(path: Path) -> ExportedProgram:
    """Read a .pt2 file. Raises FxMergeError where it is not there or cannot be read."""
    if not path.is_file():
        raise FxMergeError(f"there is no file {path}")
    try:
        with silence():
            return torch.export.load(path)
    except Exception as error:
        raise FxMergeError(f"{path} cannot be read by torch.export.load: {first_line(error)}") from error


def to_onnx(program: ExportedProgram, path: Path) -> None:
    """Write an ONNX file, whole or not at all. Raises FxMergeError where torch.onnx cannot, or its packages miss."""
    if importlib.util.find_spec("onnxscript") is None:
        raise FxMergeError("torch.onnx needs the package onnxscript; pip install 'fxmerge[onnx]'")
    try:
        with silence():
            made = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        raise FxMergeError(f"torch.onnx cannot convert the merged model: {first_line(error)}") from error
    assert made is not None
    write(path, lambda there: made.save(str(there)))
