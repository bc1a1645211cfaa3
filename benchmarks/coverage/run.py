"""Which of the models that people use fxmerge can merge: `python -m benchmarks.coverage`.

Every float torchvision model, one model of each timm family and small transformers, all with random weights, are
analysed, merged at ratio 0.5 and checked by oracles 1 and 6. Torch-Pruning 1.6.1 prunes the same models for comparison.
Each model runs in its own process, so that running out of time or memory does not affect the others. Each row is
appended to a file of JSON lines as soon as it is measured; a later run only measures missing rows. docs/coverage.md is
written from that file.
"""

import argparse
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.coverage import one_model
from benchmarks.coverage.page import TOOLS, Key, page
from benchmarks.coverage.zoo import SUITES, names
from benchmarks.harness import process
from benchmarks.harness.rows import Row, append_row, read_rows

KEY = ("suite", "name", "tool")
LIBRARIES = ("torchvision", "timm", "transformers", "torch_pruning", "benchmarks.coverage.one_model")


def measure(key: Key, timeout: float, memory: float, oracle_seconds: float) -> tuple[Row, float]:
    """Measure one row in its own process; returns it and the wall-clock seconds."""
    suite, name, tool = key
    found, seconds = process.measured(one_model.findings, (tool, suite, name, oracle_seconds), timeout, memory)
    return with_error({"suite": suite, "name": name, "tool": tool, **found}), seconds


def with_error(row: Row) -> Row:
    """Replace `ended` by an error if the process ended early, or by a note if the model was already merged by then."""
    ended = row.pop("ended", "")
    if row.get("status") == "ok":
        problem = row.pop("error", "") or ended
        if problem:
            row["silence_note" if row.get("stage") == "silence" else "oracle_note"] = problem
    else:
        row["status"] = "failed"
        if ended:
            row["error"] = f"{ended}, in {row.get('stage', 'start')}"
    return row


def requested(suites: Iterable[str], pattern: str, tools: Sequence[str], console: Console) -> Iterator[Key]:
    """The keys of the rows that a run asks for. A suite that is not installed is left out."""
    for suite in suites:
        try:
            found = names(suite)
        except ImportError as error:
            console.print(f"{suite} left out: {error}", markup=False)
            continue
        yield from ((suite, name, tool) for name in found if fnmatch(name, pattern) for tool in tools)


def progress_line(row: Row, seconds: float) -> str:
    """One line about a row, for the terminal."""
    outcome = f"{row['left']:.1%} left" if row["status"] == "ok" else row.get("error", "failed")
    oracle = f", oracle 1 {row['oracle']:.0e}" if "oracle" in row else ""
    oracle += f", oracle 6 {row['silence']:.0e}" if row.get("silence") is not None else ""
    problem = row.get("oracle_note") or row.get("silence_note")
    note = f" ({problem})" if problem else ""
    return f"{row['suite']}:{row['name']} {row['tool']}: {outcome[:160]}{oracle}{note[:120]}, {seconds:.0f} s"


def run(todo: Sequence[Key], path: Path, options: Mapping[str, Any], jobs: int, console: Console) -> None:
    """Measure rows, `jobs` at a time, and append them to the file."""
    lock, done = threading.Lock(), itertools.count(1)

    def one(key: Key) -> None:
        timeout = options["peer_timeout"] if key[2] == "peer" else options["timeout"]
        row, seconds = measure(key, timeout, options["memory"], options["oracle_seconds"])
        with lock:
            append_row(path, row)
            console.print(f"{next(done)}/{len(todo)} {progress_line(row, seconds)}", markup=False, soft_wrap=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, todo))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description="Which models fxmerge can merge."
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only models with a matching name (fnmatch)")
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=list(SUITES), help="default: all of them")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds for each model (default: 300)")
    parser.add_argument(
        "--peer-timeout", type=float, default=200, metavar="S", help="the same for the peer (default: 200)"
    )
    parser.add_argument("--oracle-seconds", type=float, default=60, metavar="S", help="CPU seconds for each oracle")
    parser.add_argument("--memory", type=float, default=14, metavar="GIB", help="of each process (its address space)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows; default: --out with suffix .jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"), metavar="FILE")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of models measured at a time")
    parser.add_argument("--no-peer", action="store_true", help="measure fxmerge only")
    parser.add_argument("--again", action="store_true", help="also measure rows that the file already has")
    parser.add_argument("--remark", default="", metavar="TEXT", help="a line for the page, on how this was run")
    args = parser.parse_args(argv)
    path = args.json or args.out.with_suffix(".jsonl")
    console = Console(stderr=True, highlight=False)
    rows = read_rows(path, KEY)
    tools = TOOLS[:1] if args.no_peer else TOOLS
    todo = [key for key in requested(args.suite, args.only, tools, console) if args.again or key not in rows]
    process.preload(*LIBRARIES)
    try:
        run(todo, path, vars(args), args.jobs, console)
    finally:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page(read_rows(path, KEY), args.remark), encoding="utf-8")
