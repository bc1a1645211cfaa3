"""Accuracy of networks that others trained, on real data: `python -m benchmarks.real --nets DIR --out docs`.

Every network in a folder (see nets.py) is made smaller by each method, at each budget, and evaluated. Each row is
measured in its own process and appended to real.jsonl as soon as it is known; a later run only measures missing rows.
real.md and real.svg are written from that file. The rows that say most come first: all originals, then ratio 0.1 of
every network, and so on. Progress is shown on a terminal only.
"""

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.harness import process, runs
from benchmarks.harness.rows import Row, read_rows
from benchmarks.real import nets, one_row
from benchmarks.real.methods import BUDGETS, METHODS, ORIGINAL, installed
from benchmarks.real.page import Key, page, plot
from fxmerge.weights.files import write_text

KEY = ("seed", "network", "budget", "method")
LIBRARIES = ("torchvision", "timm", "transformers", "torch_pruning")


def measure(key: Key, folder: Path, limit: float) -> Row:
    """Measure one row in its own process, which is stopped after `limit` seconds."""
    seed, network, budget, method = key
    return runs.measure(key, KEY, one_row.findings, (folder, network, budget, method, seed), limit)


def requested(networks: Sequence[str], budgets: Sequence[str], methods: Sequence[str], seed: int) -> Iterator[Key]:
    """The keys of the rows that a run asks for, in the order in which they are measured."""
    if ORIGINAL in methods:
        yield from ((seed, network, "", ORIGINAL) for network in networks)
    for budget in BUDGETS:
        for network in networks if budget in budgets else ():
            yield from ((seed, network, budget, m) for m in METHODS if m in methods and m != ORIGINAL)


def progress_line(row: Row) -> str:
    """One line about a row, for the terminal."""
    title = " ".join(part for part in (row["network"], row["budget"], row["method"]) if part)
    return runs.progress_line(row, title, "{metric:.2f}", "{flops:.1%} of the FLOPs")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description="Accuracy of real networks.")
    parser.add_argument("--nets", required=True, type=Path, metavar="DIR", help="folder of networks, NAME.py each")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for real.jsonl, real.md and real.svg")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this network; may be repeated")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all of them")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="default: all of them")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random (default: 0)")
    parser.add_argument("--limit", type=float, default=3600, metavar="S", help="seconds for each row (default: 3600)")
    parser.add_argument("--again", action="store_true", help="also measure rows that the file already has")
    args = parser.parse_args(argv)
    try:
        networks = nets.names(args.nets)
    except ValueError as error:
        parser.error(f"--nets: {error}")
    unknown = sorted({*(args.only or ())} - {*networks})
    if unknown:
        parser.error(f"--only: {args.nets} has no {', '.join(unknown)}; it has {', '.join(networks)}")
    console = Console(stderr=True, highlight=False)
    console.quiet = not console.is_terminal
    methods = [method for method in args.methods if installed(method)]
    for method in sorted({*args.methods} - {*methods}):
        console.print(f"{method} left out: not installed", markup=False)
    path = args.out / "real.jsonl"
    rows = read_rows(path, KEY)
    keys = requested([n for n in networks if n in (args.only or networks)], args.budgets, methods, args.seed)
    process.preload(*filter(importlib.util.find_spec, LIBRARIES), one_row.__name__)
    try:
        todo = [key for key in keys if args.again or key not in rows]
        runs.run(todo, lambda key: measure(key, args.nets, args.limit), progress_line, path, console)
    finally:
        write(path, args.seed, args.out, console)


def write(path: Path, seed: int, out: Path, console: Console) -> None:
    """Write the page, and the plot if matplotlib is installed."""
    rows = read_rows(path, KEY)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "real.md", page(rows, seed))
    try:
        plot(rows, seed, out / "real.svg")
    except ImportError:
        console.print("no plot: pip install matplotlib")
