"""How long `import fxmerge` and `fxmerge --help` take, as multiples of `import torch`.

Each command runs in a new process, in turns with the others, and the least CPU time of all rounds counts. Bytecode is
compiled in a round before, as it is after an installation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

COMMANDS = {
    "import torch": "import torch",
    "import fxmerge": "import fxmerge",
    "fxmerge --help": "import sys; sys.argv = ['fxmerge', '--help']; from fxmerge.cli.main import main; main()",
}


def cpu_seconds(command: str, environment: dict[str, str]) -> float:
    """User and system time of a new Python process that runs this command."""
    before = os.times()
    subprocess.run([sys.executable, "-c", command], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def measured(rounds: int) -> dict[str, float]:
    """{command: the least CPU seconds of all rounds}."""
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = bytecode
        found = [{name: cpu_seconds(c, environment) for name, c in COMMANDS.items()} for _ in range(rounds + 1)]
    return {name: min(seconds[name] for seconds in found[1:]) for name in COMMANDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    seconds = measured(parser.parse_args().rounds)
    base = seconds["import torch"]
    for name, taken in seconds.items():
        print(f"{name:15} {taken:6.2f} s   {taken / base:5.2f} of import torch   {taken - base:+6.2f} s")


if __name__ == "__main__":
    main()
