"""Perplexity of pruned language models: `python -m benchmarks.language --nets DIR --out docs`.

A share of the parameters of the decoder layers is removed by fxmerge and by published methods, on the same tokens of
the validation text, and the perplexity is measured on the test text. The network is a module NAME.py of a folder (see
benchmarks/real/nets.py), whose `evaluate` takes `windows` and `split`. Each row is measured in its own process and
appended to a file as soon as it is known; a later run only measures missing rows. language.md and language.svg are
written from that file. Progress is shown on a terminal only.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.harness import process, runs
from benchmarks.harness.rows import Row, read_rows
from benchmarks.language import one_row
from benchmarks.language.methods import DENSE, METHODS, REMOVED
from benchmarks.language.page import Key, page, plot
from benchmarks.real import nets
from fxmerge.weights.files import write_text

KEY = ("seed", "network", "removed", "method")


def measure(key: Key, folder: Path, limit: float) -> Row:
    """Measure one row in its own process, which is stopped after `limit` seconds."""
    seed, network, removed, method = key
    return runs.measure(key, KEY, one_row.findings, (folder, network, removed, method, seed), limit)


def requested(network: str, shares: Sequence[float], methods: Sequence[str], seed: int) -> Iterator[Key]:
    """The keys of the rows that a run asks for, in the order in which they are measured."""
    if DENSE in methods:
        yield seed, network, 0.0, DENSE
    for removed in shares:
        yield from ((seed, network, removed, method) for method in METHODS if method in methods and method != DENSE)


def progress_line(row: Row) -> str:
    """One line about a row, for the terminal."""
    title = f"{row['network']} {row['removed']:.0%} {row['method']}"
    return runs.progress_line(row, title, "perplexity {perplexity:.2f}", "{parameters:.1%} of the layers")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language", description="Pruned language models.")
    parser.add_argument("--nets", required=True, type=Path, metavar="DIR", help="folder of networks, NAME.py each")
    parser.add_argument("--network", default="smollm2_135m", metavar="NAME", help="default: smollm2_135m")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for language.md and language.svg")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="the rows; default: language.jsonl in --out")
    parser.add_argument("--only", action="append", choices=METHODS, help="only this method; may be repeated")
    parser.add_argument("--removed", nargs="+", type=share, default=list(REMOVED), metavar="SHARE",
                        help=f"of the decoder layers' parameters; default: {' '.join(map(str, REMOVED))}")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random (default: 0)")
    parser.add_argument("--limit", type=float, default=3600, metavar="S", help="seconds for each row (default: 3600)")
    parser.add_argument("--again", action="store_true", help="also measure rows that the file already has")
    args = parser.parse_args(argv)
    try:
        networks = nets.names(args.nets)
    except ValueError as error:
        parser.error(f"--nets: {error}")
    if args.network not in networks:
        parser.error(f"--network: {args.nets} has no {args.network}; it has {', '.join(networks)}")
    console = Console(stderr=True, highlight=False)
    console.quiet = not console.is_terminal
    path = args.rows or args.out / "language.jsonl"
    rows = read_rows(path, KEY)
    keys = requested(args.network, args.removed, args.only or list(METHODS), args.seed)
    process.preload("transformers", one_row.__name__)
    try:
        todo = [key for key in keys if args.again or key not in rows]
        runs.run(todo, lambda key: measure(key, args.nets, args.limit), progress_line, path, console)
    finally:
        write(read_rows(path, KEY), args.network, args.seed, args.out, console)


def share(text: str) -> float:
    """A number between 0 and 1, from the command line."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def write(rows: dict[Key, Row], network: str, seed: int, out: Path, console: Console) -> None:
    """Write the page, and the plot if matplotlib is installed."""
    found = {key[2:]: row for key, row in sorted(rows.items()) if key[:2] == (seed, network)}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "language.md", page(found, network, seed))
    try:
        plot(found, out / "language.svg")
    except ImportError:
        console.print("no plot: pip install matplotlib")
