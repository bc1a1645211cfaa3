"""Recovery of narrowed networks by fine-tuning: `python -m benchmarks.recover --data DIR --weights DIR --out docs`.

Trained networks are narrowed to a share of their FLOPs by several methods, and trained for some epochs on the same
images. Each row is a training of its own, whose learning rate falls to zero over its epochs. It is measured in its own
process and appended to a file as soon as it is known; a later run only measures missing rows, and goes on with the one
that was stopped. recovery.md and recovery.svg are written from that file.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.harness import process, runs
from benchmarks.harness.rows import Row, read_rows
from benchmarks.recover import one_row
from benchmarks.recover.methods import EPOCHS, METHODS, NETWORKS, ORIGINAL
from benchmarks.recover.page import Key, page, plot
from fxmerge.weights.files import write_text

KEY = ("seed", "network", "method", "epochs")


def requested(networks: Sequence[str], methods: Sequence[str], epochs: Sequence[int], seed: int) -> Iterator[Key]:
    """The keys of the rows that a run asks for, the shortest first."""
    for network in networks:
        if ORIGINAL in methods:
            yield seed, network, ORIGINAL, 0
        for count in epochs:
            named = (name for name in METHODS if name in methods and name != ORIGINAL)
            trained = (name for name in named if count or not (METHODS[name].shrunk or METHODS[name].distilled))
            yield from ((seed, network, name, count) for name in trained)


def progress_line(row: Row) -> str:
    """One line about a row, for the terminal."""
    title = f"{row['network']} {row['method']} {row['epochs']} epochs"
    return runs.progress_line(row, title, "{accuracy:.2f} %", "{flops:.1%} of the FLOPs")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recover", description="Recovery by fine-tuning.")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder that holds CIFAR-10")
    parser.add_argument("--weights", required=True, type=Path, metavar="DIR", help="folder of safetensors files")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for recovery.md and recovery.svg")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="the rows; default: recovery.jsonl in --out")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="only this network; may be repeated")
    parser.add_argument("--only", action="append", choices=METHODS, help="only this method; may be repeated")
    parser.add_argument("--epochs", nargs="+", type=int, default=list(EPOCHS), metavar="N",
                        help=f"default: {' '.join(map(str, EPOCHS))}")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile, in half the time")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random (default: 0)")
    parser.add_argument("--limit", type=float, default=72000, metavar="S", help="CPU seconds for each row")
    parser.add_argument("--again", action="store_true", help="also measure rows that the file already has")
    args = parser.parse_args(argv)
    console = Console(stderr=True, highlight=False)
    console.quiet = not console.is_terminal
    path = args.rows or args.out / "recovery.jsonl"
    rows = read_rows(path, KEY)

    def measure(key: Key) -> Row:
        seed, network, method, epochs = key
        state = path.with_name(f"{path.stem}-{'-'.join(map(str, key))}.safetensors")
        how = args.threads, args.bf16, args.compile
        task = one_row.Task(network, method, epochs, seed, args.data, args.weights, state, *how)
        return runs.measure(key, KEY, one_row.findings, (task,), args.limit)

    process.preload(one_row.__name__)
    try:
        keys = requested(args.network or list(NETWORKS), args.only or list(METHODS), args.epochs, args.seed)
        runs.run([key for key in keys if args.again or key not in rows], measure, progress_line, path, console)
    finally:
        write(read_rows(path, KEY), args.seed, args.out, console)


def write(rows: dict[Key, Row], seed: int, out: Path, console: Console) -> None:
    """Write the page, and the plot if matplotlib is installed."""
    found = {key[1:]: row for key, row in sorted(rows.items()) if key[0] == seed}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "recovery.md", page(found, seed))
    try:
        plot(found, out / "recovery.svg")
    except ImportError:
        console.print("no plot: pip install matplotlib")
