"""Measures one row in its own process, so that running out of time or memory does not affect the other rows.

Each finding is written as one line of JSON as soon as it is known, so that nothing is lost if the process is stopped.
"""

import json
import math
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import fxmerge

Finding = dict[str, Any]

PATIENCE = 20  # wall-clock seconds of a process for each CPU second that it may use
# the server imports the libraries once and does nothing else; each process is forked from it
PROCESSES = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Import these modules once for all processes. One thread for each process; nothing is downloaded."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    PROCESSES.set_forkserver_preload(["torch", "fxmerge", *modules])


def measured(
    findings: Callable[..., Iterable[Finding]], arguments: Sequence[Any], seconds: float, memory: float | None = None
) -> tuple[Finding, float]:
    """All findings of `findings(*arguments)`, run in its own process; and the wall-clock seconds that it took.

    seconds:  the process is stopped after this CPU time, so that other processes on the machine do not change the
              outcome; one that waits is stopped after PATIENCE times as long
    memory:   largest address space of the process, in GiB

    If the process does not end by itself, the findings include those that it wrote until then, and `ended` says why.
    """
    found: Finding = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, noise = Path(folder, "findings.jsonl"), Path(folder, "noise.txt")
        process = PROCESSES.Process(target=_write, args=(findings, arguments, out, noise, seconds, memory))
        process.start()
        try:
            process.join(PATIENCE * seconds)
            if process.is_alive() or process.exitcode == -signal.SIGXCPU:
                found["ended"] = f"stopped after {seconds:.0f} s"
        finally:
            process.kill()
            process.join()
        found |= combined(out.read_text(encoding="utf-8").splitlines() if out.exists() else [])
        if "ended" not in found and process.exitcode:
            last = noise.read_text(encoding="utf-8", errors="replace").split("\n")[-2:] if noise.exists() else []
            found["ended"] = " ".join(["killed" if process.exitcode < 0 else "died", *last]).strip()
            found["ended"] += f" (exit status {process.exitcode})"
    return found, time.monotonic() - start


def _write(
    findings: Callable[..., Iterable[Finding]],
    arguments: Sequence[Any],
    out: Path,
    noise: Path,
    seconds: float,
    memory: float | None,
) -> None:
    """The target of the process: findings go to the file `out`, and all output of libraries to the file `noise`."""
    sink = os.open(noise, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if memory is not None:
        limit = int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    used = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (used, used + 5))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with out.open("a", encoding="utf-8") as file:
        for finding in findings(*arguments):
            file.write(json.dumps(finding) + "\n")
            file.flush()


def combined(lines: Iterable[str]) -> Finding:
    """All findings of a process as one record; later findings replace earlier ones."""
    found: Finding = {}
    for line in lines:
        try:
            found |= json.loads(line)
        except ValueError:  # the process was stopped in the middle of a line
            break
    return found


def caught(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings; if an exception ends them, the last one has it as `error`."""
    try:
        yield from findings
    except Exception as error:
        no_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        yield {"error": "out of memory" if no_memory else one_line(error)}


def one_line(error: Exception) -> str:
    """An error as one line. Errors that fxmerge did not raise get their type and the innermost line of fxmerge."""
    text = " ".join(str(error).split())
    for prefix in {str(Path(torch.__file__).parents[1]), str(Path(fxmerge.__file__).parents[1])}:
        text = text.replace(f"{prefix}/", "")
    if isinstance(error, fxmerge.FxMergeError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/fxmerge/" in f.filename]
    place = f" (fxmerge/{Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {text[:600]}{place}"
