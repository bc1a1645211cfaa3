"""benchmarks.harness: the file of rows that a run resumes from, and rows measured in their own processes."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxmerge
from benchmarks.harness import process
from benchmarks.harness.memory import peak_memory, reset_peak_memory
from benchmarks.harness.rows import append_row, read_rows
from tests.helpers.slow import slow_but


def test_a_later_row_replaces_an_earlier_one_and_an_incomplete_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "below" / "rows.jsonl"
    append_row(path, {"suite": "s", "name": "a", "left": 0.5})
    with path.open("a") as file:
        file.write('{"suite": "timm", "na')
    append_row(path, {"suite": "s", "name": "b", "left": 0.4})
    append_row(path, {"suite": "s", "name": "a", "left": 0.3})
    rows = read_rows(path, ("suite", "name"))
    assert [(key, row["left"]) for key, row in rows.items()] == [(("s", "a"), 0.3), (("s", "b"), 0.4)]
    assert read_rows(tmp_path / "none.jsonl", ("name",)) == {}


def measure(
    findings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *arguments: Any, seconds: float = 60
) -> process.Finding:
    monkeypatch.setattr(process, "PROCESSES", multiprocessing.get_context("fork"))
    return process.measured(findings, arguments, seconds)[0]


def good(value: float) -> Iterator[process.Finding]:
    os.write(1, b"output of a library")
    yield {"stage": "start", "value": 0}
    yield {"value": value, "threads": torch.get_num_threads(), "stage": "done"}


def slow() -> Iterator[process.Finding]:
    yield {"stage": "merge"}
    time.sleep(600)


def dying() -> Iterator[process.Finding]:
    yield {"stage": "merge"}
    os.write(2, b"some noise\nlast words\n")
    os._exit(3)


def failing(error: Exception) -> Iterator[process.Finding]:
    def findings() -> Iterator[process.Finding]:
        yield {"stage": "merge"}
        raise error

    return process.caught(findings())


def test_later_findings_replace_earlier_ones_and_output_is_caught(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert measure(good, monkeypatch, 2.5) == {"stage": "done", "value": 2.5, "threads": 1}
    assert capfd.readouterr() == ("", "")


def busy() -> Iterator[process.Finding]:
    yield {"stage": "merge"}
    while True:
        pass


@pytest.mark.parametrize("findings", slow_but([busy], [slow, busy]))
def test_a_process_out_of_time_keeps_its_findings(findings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is that of the CPU; a process that waits is stopped too."""
    monkeypatch.setattr(process, "PATIENCE", 1 if findings is slow else 600)
    assert measure(findings, monkeypatch, seconds=2) == {"stage": "merge", "ended": "stopped after 2 s"}


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(dying, monkeypatch) == {"stage": "merge", "ended": "died last words (exit status 3)"}


def test_an_error_is_the_last_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(failing, monkeypatch, RuntimeError("sizes\n  of 3 and 4 differ"))
    assert found == {"stage": "merge", "error": "RuntimeError: sizes of 3 and 4 differ"}
    assert measure(failing, monkeypatch, MemoryError())["error"] == "out of memory"
    assert measure(failing, monkeypatch, fxmerge.FxMergeError("give inputs"))["error"] == "give inputs"


def test_the_incomplete_line_of_a_stopped_process_is_skipped() -> None:
    assert process.combined(['{"a": 1}', '{"a": 2, "b": 3}', '{"le']) == {"a": 2, "b": 3}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak")
def test_peak_memory_counts_what_was_freed_until_it_is_reset() -> None:
    held = reset_peak_memory()
    big = torch.ones(2**25)  # 128 MiB
    del big
    assert peak_memory() - held > 100 * 2**20
    assert reset_peak_memory() - held < 64 * 2**20
