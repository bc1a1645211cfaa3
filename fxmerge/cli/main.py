"""The command line: `fxmerge demo | analyze SPEC | merge SPEC --out DIR | sweep SPEC --out DIR | draw SPEC --out FILE`.

The flags of `merge` and `sweep` include the fields of `Options`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

import fxmerge
from fxmerge.api import analyze, merge
from fxmerge.cli import demo as demonstration
from fxmerge.cli.data import Dtype, calibration, example_inputs
from fxmerge.cli.specs import dynamic_shapes, function, load
from fxmerge.cli.terminal import plain_where_needed
from fxmerge.errors import FxMergeError
from fxmerge.keywords import Budget
from fxmerge.options import Options
from fxmerge.report.drawable import drawn_as
from fxmerge.result import Result
from fxmerge.sweep import sweep

RANDOM = (
    "has random weights, so nothing that is measured here holds for a trained model; give --pretrained, or --weights "
    "with your own"
)


@dataclasses.dataclass(frozen=True)
class Input:
    """The model."""

    spec: Annotated[str, tyro.conf.Positional]
    """torchvision:resnet18, timm:NAME, package.module:factory, path/to/file.py:factory, a .pt2 file, a saved folder"""
    weights: Path | None = None
    """a .safetensors file with the model's state_dict"""
    pretrained: bool = False
    """use the published weights of a torchvision or timm model, which are downloaded if necessary"""
    on_disk: bool = False
    """read the weights from the file (or folder of files) only when needed, for models larger than memory"""
    inputs: Path | None = None
    """example inputs: a .npz, .npy or .safetensors file (arrays are named as forward's arguments), an image, or a
    folder of images"""
    shape: tuple[int, ...] = ()
    """shape of a random example input; by default 1 3 224 224, or 1 128 with --ids"""
    ids: bool = False
    """the random example input is token ids, below the size of the model's first nn.Embedding"""
    dtype: Dtype | None = None
    """dtype of the weights and of floating-point inputs; by default, that of the weights"""
    dynamic: tuple[str, ...] = ()
    """sizes that vary, as INPUT:AXIS[,AXIS...], such as x:0,2,3; others are fixed. Without it, what can vary does"""


@dataclasses.dataclass(frozen=True)
class SweepOptions(Options):
    """The options of a sweep, whose budgets take the place of ratio and budget."""

    ratio: tyro.conf.Suppress[tyro.conf.Fixed[float]] = Options.ratio
    budget: tyro.conf.Suppress[tyro.conf.Fixed[Mapping[str, float]]] = dataclasses.field(default_factory=dict)


Calibration = Annotated[
    Path | None,
    tyro.conf.arg(
        help="unlabelled inputs for refit, in place of synthetic ones: a folder of images or of .npz, .npy or "
        ".safetensors files, or one such file; samples are along the first axis"
    ),
]


@dataclasses.dataclass(frozen=True)
class Demo:
    """Merge the included LeNet-300-100; measure it on 2,000 Fashion-MNIST images."""

    json: bool = False
    """print JSON instead of a table"""


@dataclasses.dataclass(frozen=True)
class Analyze:
    """Show which channels can be merged, which cannot, and why."""

    input: Annotated[Input, tyro.conf.arg(name="")]
    json: bool = False
    """print JSON instead of tables"""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merge a model; write a folder with its code and weights, or one file."""

    input: Annotated[Input, tyro.conf.arg(name="")]
    out: Path
    """folder to write model.py, weights.safetensors, plan.json and the report to, created if necessary; or NAME.pt2 or
    NAME.onnx, to write that one file"""
    calibration: Calibration = None
    options: Annotated[Options, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Options)
    json: bool = False
    """print JSON instead of tables"""
    report: Path | None = None
    """also draw the merge to this file: .html, .svg, .dot, .gv, .mmd, .graphml or .json"""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Merge a model at several budgets; write a table and a plot."""

    input: Annotated[Input, tyro.conf.arg(name="")]
    budgets: tuple[float, ...]
    """shares of the original's cost that may remain"""
    out: Path
    """folder for the results; points that are already there are not computed again"""
    kind: Budget = "flops"
    """cost that the budgets are shares of"""
    evaluate: str | None = None
    """package.module:function or path/to/file.py:function, which takes a model and returns a number"""
    calibration: Calibration = None
    options: Annotated[SweepOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SweepOptions)
    json: bool = False
    """print JSON instead of a table"""


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draw a model with its merge groups to a file."""

    input: Annotated[Input, tyro.conf.arg(name="")]
    out: Path
    """file to write; its extension is .html, .svg (needs Graphviz), .dot, .gv, .mmd (Mermaid), .graphml or .json"""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Analyze, tyro.conf.subcommand("analyze")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Draw, tyro.conf.subcommand("draw")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0, 130 after Ctrl-C, or 2 after an error, printed to stderr.

    Exits with status 2 for wrong usage.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with plain_where_needed():
        try:
            if arguments == ["--version"]:
                print(f"fxmerge {fxmerge.__version__}")
                return 0
            command: Any = tyro.cli(
                Command,
                args=arguments,
                prog="fxmerge",
                description="Make trained PyTorch models smaller, without training and without data.\n"
                "`fxmerge --version` prints the version.",
            )
            print(_run(command))
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("fxmerge: interrupted", file=sys.stderr)
            return 130
        except (FxMergeError, OSError) as error:
            print(f"fxmerge: {error}", file=sys.stderr)
            return 2
    return 0


def _written(out: Path, result: Result) -> None:
    """Writes a merged model in the form that the name of `out` asks for."""
    write = {".pt2": result.save_program, ".onnx": result.to_onnx}.get(out.suffix.lower(), result.save)
    write(out)


def _check_out(out: Path, files: Sequence[str] = ()) -> None:
    """Raises FxMergeError for a path that looks like a file of another format, of which a folder would be made.

    files: the extensions of files that can be written
    """
    suffix = out.suffix.lower()
    if suffix in files or out.is_dir() or not re.fullmatch(r"\.[a-z]{2}\w*", suffix):
        return
    others = f", or end it with {' or '.join(files)}" if files else ""
    raise FxMergeError(
        f"--out {out} looks like a file, but {suffix} files cannot be written; give a folder, whose name has no "
        f"extension{others}"
    )


def _run(command: Demo | Analyze | Merge | Sweep | Draw) -> str:
    if isinstance(command, Demo):
        rows = demonstration.run()
        return demonstration.as_json(rows) if command.json else demonstration.as_text(rows, *demonstration.terminal())
    if isinstance(command, (Merge, Sweep)):
        _check_out(command.out, (".pt2", ".onnx") if isinstance(command, Merge) else ())
        if command.options.refit == "calibration" and command.calibration is None:
            raise FxMergeError("--refit calibration needs inputs; give --calibration with a folder of images or a file")
    drawing = command.out if isinstance(command, Draw) else getattr(command, "report", None)
    if drawing is not None:
        drawn_as(drawing)  # raises for an unknown format before the computation, not after it
    measure = function(command.evaluate) if isinstance(command, Sweep) and command.evaluate else None
    shapes = dynamic_shapes(command.input.dynamic)
    given, merging = command.input, isinstance(command, (Merge, Sweep))
    source = load(given.spec, given.weights, given.on_disk, given.pretrained, given.dtype)
    inputs = example_inputs(source, given.inputs, given.shape, given.ids, given.dtype)
    model = source.model
    if source.random and merging:
        print(f"fxmerge: {given.spec} {RANDOM}", file=sys.stderr)
    if isinstance(command, Analyze):
        report = analyze(model, inputs, dynamic_shapes=shapes).report
        return report.json() if command.json else report.text(*demonstration.terminal()).rstrip()
    if isinstance(command, Draw):
        analyze(model, inputs, dynamic_shapes=shapes).report.draw(command.out)
        return f"written: {command.out}"
    if isinstance(command, Sweep):
        options = Options(**{field.name: getattr(command.options, field.name) for field in dataclasses.fields(Options)})
        curve = sweep(
            model, inputs, command.budgets, measure, kind=command.kind, options=options, out=command.out,
            calibration=calibration(command.calibration, source), dynamic_shapes=shapes,
        )  # fmt: skip
        return curve.json() if command.json else curve.text(*demonstration.terminal()) + f"written: {command.out}"
    result = merge(model, inputs, command.options, calibration(command.calibration, source), shapes)
    _written(command.out, result)
    if command.report is not None:
        result.report.draw(command.report)
    if command.json:
        return result.report.json()
    files = sorted(command.out.iterdir()) if command.out.is_dir() else [command.out]
    files += [command.report] if command.report is not None else []
    written = "\n".join(f"written: {path}" for path in files)  # a path is not broken, so that it can be copied
    return result.report.text(*demonstration.terminal()) + written
