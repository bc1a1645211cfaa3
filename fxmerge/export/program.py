"""Export a merged model as an ExportedProgram, a .pt2 file or an ONNX file, and read a .pt2 file."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.capture.declared_sizes import declared, doubled, refused
from fxmerge.capture.torch_export import silence
from fxmerge.errors import FxMergeError, first_line
from fxmerge.export.check import Expected
from fxmerge.weights.files import write

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def dynamic(program: ExportedProgram | None) -> Any:
    """The dynamic shapes of an exported program, by input name, as torch.export.export takes them.

    None for None and for a program whose shapes are all static.
    """
    if program is None:
        return None
    from torch.export import Dim

    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    known: dict[str, Any] = {}

    def size(value: Any) -> Any:
        symbol = value.node.expr
        if not symbol.is_Symbol:
            return Dim.AUTO  # a size that is computed from others
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


def exported(module: nn.Module, expected: Expected, dynamic_shapes: Any) -> ExportedProgram:
    """The module as an ExportedProgram.

    Raises FxMergeError with the reason if torch.export fails or if the program does not return what the module does.
    """
    (args, kwargs), _ = expected.calls[0]
    shapes = None
    try:
        shapes = declared(dynamic_shapes, module, args, kwargs)
        args, kwargs = doubled((args, kwargs), module.forward, shapes) if shapes else (args, kwargs)
        with silence(), torch.no_grad():
            made = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        why = (refused(error, shapes) if shapes else None) or error
        raise FxMergeError(
            f"torch.export cannot export the merged model: {first_line(why)}; pass other dynamic_shapes"
        ) from error
    if words := sorted({part for name in made.state_dict for part in name.split(".") if iskeyword(part)}):
        try:
            made.module()
        except SyntaxError as error:
            raise FxMergeError(
                f"torch.export writes code with the names of submodules and parameters, in which {', '.join(words)} "
                "cannot stand, since it is a keyword of Python; give it another name in the model"
            ) from error
    expected.confirm(_runnable(made), "the exported program")
    return made


def _runnable(program: ExportedProgram) -> Callable[..., Any]:
    """The module of a program. It is made at the first call, which raises what torch raises."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with silence():
            return program.module()(*args, **kwargs)

    return call


def save(program: ExportedProgram, path: Path, expected: Expected) -> None:
    """Write a .pt2 file. The write is atomic: if it fails, an existing file is unchanged.

    Raises FxMergeError if the program in the file does not return what the merged model does.
    """

    def fill(there: Path) -> None:
        with there.open("wb") as file:
            torch.export.save(program, file)
        with silence(), there.open("rb") as file:
            read = torch.export.load(file)
        expected.confirm(_runnable(read), f"the program in {path}")

    write(path, fill)


def load(path: Path) -> ExportedProgram:
    """Read a .pt2 file. Raises FxMergeError if it does not exist or cannot be read."""
    if not path.is_file():
        raise FxMergeError(f"the file {path} does not exist")
    try:
        with silence():
            return torch.export.load(path)
    except Exception as error:
        raise FxMergeError(f"{path} cannot be read by torch.export.load: {first_line(error)}") from error


def to_onnx(program: ExportedProgram, path: Path, expected: Expected, random: bool) -> None:
    """Write an ONNX file. The write is atomic: if it fails, an existing file is unchanged.

    random: whether the model's outputs depend on a seed; they are then not compared
    Raises FxMergeError if torch.onnx cannot convert the program, if the package onnxscript is missing, or if the file
    does not return what the merged model does. Warns if it cannot be run, because onnxruntime is missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise FxMergeError("torch.onnx needs the package onnxscript; install it with pip install 'fxmerge[onnx]'")
    try:
        with silence():
            made = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        raise FxMergeError(f"torch.onnx cannot convert the merged model: {first_line(error)}") from error
    assert made is not None
    runs = importlib.util.find_spec("onnxruntime") is not None
    if not runs:
        warnings.warn(
            f"{path} was not compared with the merged model, since onnxruntime is not installed", stacklevel=3
        )

    def fill(there: Path) -> None:
        made.save(str(there))
        if runs and not random:
            from onnxscript import ir

            read = torch.onnx.ONNXProgram(ir.load(there), program)
            expected.confirm(read, f"the ONNX file {path}", slack=_ONNX)

    write(path, fill)


_ONNX = 1e-3  # relative error of outputs that is accepted of another library's kernels
