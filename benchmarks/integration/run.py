"""What users can do with merged models: `python -m benchmarks.integration` writes docs/integration.md.

Each model runs in its own process. Rows are appended to a file of JSON lines; a later run only measures missing rows.
"""

import argparse
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from benchmarks.harness import process
from benchmarks.harness.page import escaped, short
from benchmarks.harness.rows import Row, append_row, read_rows
from benchmarks.integration import one_model
from benchmarks.integration.models import KINDS
from benchmarks.integration.one_model import NONE, YES

COLUMNS = ("own class", "any size", "save, load", "from_pretrained", "generate, predict", "ONNX", "compile")
HEAD = """# Integration

`python -m benchmarks.integration` writes this page: models with random weights, merged at ratio 0.25 without refit, and
then used as their users would. *yes* was run, and compared with `result.module` where that returns the same; a number
refers to the reasons below each table; - means that there is nothing to try.

- *own class*: `result.model` is of the class that was given, and returns what `result.module` does.
- *any size*: other numbers of samples (1 and 4), and tokens of another length; detection: two other images run.
- *save, load*: `result.save`, then `fxmerge.load`; models that were captured in parts go into their own class.
- *from_pretrained*: `result.save_pretrained`, which loads what it wrote and compares.
- *generate, predict*: the method of `result.model`, with its cache; YOLO's predict; the boxes of a detector.
- *ONNX*: `result.to_onnx` with free numbers of samples and lengths, run by onnxruntime on other ones.
- *compile*: torch.compile with dynamic shapes (backend aot_eager): one graph for two sizes.
"""


def page(rows: Mapping[tuple[str, ...], Row]) -> str:
    """The page as Markdown."""
    cells = [row.get(c, row.get("error", "not reached")) for row in rows.values() for c in COLUMNS]
    tried = [cell for cell in cells if cell != NONE]
    share = sum(cell == YES for cell in tried) / max(len(tried), 1)
    whole = sum(len(names) for names, _ in KINDS.values())
    measured = f"{len(rows)} of {whole} models are measured. "
    text = [HEAD, f"{measured}{sum(c == YES for c in tried)} of {len(tried)} are *yes* ({share:.0%}).\n"]
    for kind, (names, _) in KINDS.items():
        reasons: list[str] = []
        text += [
            f"## {kind}\n",
            "| model | captured | " + " | ".join(COLUMNS) + " |",
            "|---" * (len(COLUMNS) + 2) + "|",
        ]
        for name in names:
            row = rows.get((kind, name))
            if row is None:
                continue
            found = []
            for column in COLUMNS:
                cell = row.get(column, row.get("error", "not reached"))
                if cell not in (YES, NONE):
                    if cell not in reasons:
                        reasons.append(cell)
                    cell = f"({reasons.index(cell) + 1})"
                found.append(cell)
            text.append(f"| {name} | {row.get('route', '')} | " + " | ".join(found) + " |")
        text += ["", *(f"{i}. {escaped(short(reason, 300))}" for i, reason in enumerate(reasons, 1)), ""]
    return "\n".join(text).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.integration", description="Use merged models.")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only models with a matching name (fnmatch)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds for each model (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("docs/integration.md"), metavar="FILE")
    parser.add_argument("--again", action="store_true", help="also measure rows that the file already has")
    args = parser.parse_args(argv)
    console, path = Console(stderr=True, highlight=False), args.out.with_suffix(".jsonl")
    rows = read_rows(path, ("kind", "name"))
    keys = [(kind, name) for kind, (names, _) in KINDS.items() for name in names if fnmatch(name, args.only)]
    process.preload("torchvision", "benchmarks.integration.one_model")
    for kind, name in keys:
        if (kind, name) in rows and not args.again:
            continue
        found, seconds = process.measured(one_model.findings, (kind, name), args.timeout)
        append_row(path, {"kind": kind, "name": name, **found})
        good = sum(found.get(c) in (YES, NONE) for c in COLUMNS)
        console.print(f"{name}: {good} of {len(COLUMNS)}, {seconds:.0f} s", markup=False)
    args.out.write_text(page(read_rows(path, ("kind", "name"))), encoding="utf-8")
