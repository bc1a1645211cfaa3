"""Runs all oracles on many random nets: `python -m benchmarks.coverage.random_nets --count 5000 --seed 0`.

Net i has the seed `--seed` + i, from which its source, weights and inputs follow. Prints one line for each net on which
an oracle is red or fxmerge raises an error, and the counts at the end. `--show SEED` prints the source of one net.
"""

import argparse
import random
import time
import traceback
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from tests.helpers.random_checks import check
from tests.helpers.random_nets import written
from tests.helpers.random_steps import STEPS


def source_of(seed: int, steps: int = 9, off: Collection[str] = (), first: str = "") -> str:
    """The source of the net with this seed."""
    return written(random.Random(seed).choice, steps, off, first)


def outcome(source: str) -> str:
    """Empty if all is right, "oracle: ..." if one is red, "crash: ..." for any exception."""
    try:
        check(source)
    except AssertionError as error:
        return f"oracle: {_one_line(error)}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"crash: {type(error).__name__}: {_one_line(error)} ({Path(frame.filename).name}:{frame.lineno})"
    return ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text else traceback.extract_tb(error.__traceback__)[-1].line or "assertion"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if an oracle was red or anything crashed."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage.random_nets", description="All oracles on many random nets."
    )
    parser.add_argument("--count", type=int, default=200, metavar="N", help="number of nets (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first net (default: 0)")
    parser.add_argument("--steps", type=int, default=9, metavar="N", help="most steps of a net (default: 9)")
    parser.add_argument("--without", nargs="+", choices=sorted(names), default=[], help="steps that are not taken")
    parser.add_argument("--first", choices=names, default="", help="the step that is taken first in each net")
    parser.add_argument("--show", type=int, metavar="SEED", help="print the source of one net, and run it")
    args = parser.parse_args(argv)
    off = args.without
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.show is not None:
        source = source_of(args.show, args.steps, off, args.first)
        found = outcome(source)
        print(source, found or "all oracles agree", sep="\n")
        return int(bool(found))
    red, crashed, start = 0, 0, time.monotonic()
    for seed in range(args.seed, args.seed + args.count):
        found = outcome(source_of(seed, args.steps, off, args.first))
        red += found.startswith("oracle")
        crashed += found.startswith("crash")
        if found:
            print(f"seed {seed}: {found[:300]}", flush=True)
    seconds = time.monotonic() - start
    print(f"{args.count} nets, {red} with a red oracle, {crashed} crashes, {seconds:.0f} s")
    return int(bool(red or crashed))


if __name__ == "__main__":
    raise SystemExit(main())
