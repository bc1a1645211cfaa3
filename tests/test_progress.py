"""The progress line: on a real terminal (a pty), in a pipe, in a notebook, and after Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from fxmerge import progress as progressing
from fxmerge.progress import Estimate, duration, progress
from tests.helpers.slow import slow_but

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
ROOT = Path(__file__).resolve().parents[1]
STAGES = """
import sys, time
from fxmerge.progress import progress
print("out", flush=True)
with progress() as stage:
    stage("capture")
    time.sleep(0.3)
    stage("decomposition the_language_model.encoder.layer.11.attention.self.[query]" + "x" * 300)
    print("printed by the model", flush=True)
    time.sleep(60 if sys.argv[1] == "wait" else 0.3)
print("end", flush=True)
"""


def on_terminal(what: str, stdout: int | None = None, **environment: str) -> tuple[str, int]:
    """What a script wrote to a terminal of 60 columns, and its exit status.

    stdout: a file descriptor to be its stdout in place of the terminal
    """
    ours, theirs = pty.openpty()
    held = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", STAGES, what], stdin=theirs, stdout=theirs if stdout is None else stdout, stderr=theirs,
        cwd=ROOT, env={**held, "TERM": "xterm", "COLUMNS": "60", "PYTHONPATH": str(ROOT), **environment},
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    found, sent = b"", False
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
        if what == "wait" and not sent and b"decomposition" in found:
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            sent = True
    os.close(ours)
    return found.decode(), process.wait(timeout=120)


def last_screen(text: str) -> list[str]:
    """The lines that remain on the terminal, by the escapes for moving up, erasing a line and hiding the cursor."""
    lines, row, start = [""], 0, True
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            start = True
            continue
        elif part.endswith("A"):
            row = max(0, row - int(part[2:-1] or 1))
        elif part.endswith("K"):
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = part if start else lines[row] + part
        start = False
    return lines


@pytest.mark.slow
def test_one_line_on_a_terminal_that_is_gone_at_the_end() -> None:
    text, status = on_terminal("short")
    assert status == 0 and "capture" in text and "decomposition" in text
    drawn = [re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", line).strip("\r") for line in re.split(r"\r|\n", text)]
    assert all(len(line) <= 60 for line in drawn)
    assert not any("x" * 20 in line and "decomposition" not in line for line in drawn)  # it never takes a second line
    assert [line for line in last_screen(text) if line.strip()] == ["out", "printed by the model", "end"]
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0  # the cursor is shown again
    assert text.isascii()


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    text, status = on_terminal("wait")
    assert status in (130, -signal.SIGINT, 1) and text.rstrip().endswith("KeyboardInterrupt")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
    before, _, after = text.rpartition("\x1b[?25h")
    assert "\x1b[2K" in after or "\x1b[2K" in before[-40:]


@pytest.mark.parametrize("environment", slow_but([{"TERM": "dumb"}], [{"TERM": "dumb"}, {"TERM": "unknown"}]))
def test_nothing_on_a_terminal_that_cannot_erase(environment: dict[str, str]) -> None:
    text, status = on_terminal("short", **environment)
    assert status == 0 and text.splitlines() == ["out", "printed by the model", "end"]


PIPES = [{"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}, {}]


@pytest.mark.parametrize("environment", slow_but(PIPES[:1], PIPES))
def test_silent_in_a_pipe(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAGES, "short"], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("out\nprinted by the model\nend\n", "")


@pytest.mark.slow
def test_what_the_model_prints_stays_on_stdout() -> None:
    read, write = os.pipe()
    text, status = on_terminal("short", stdout=write)
    os.close(write)
    with os.fdopen(read) as piped:
        assert piped.read() == "out\nprinted by the model\nend\n"
    assert status == 0 and "decomposition" in text and "printed" not in text


class Cell:
    """What IPython gives a cell of a notebook: displayed texts, which may be replaced."""

    kernel = object()

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        found = types.ModuleType("IPython.display")
        found.display = self.display  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython.display", found)
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: self))  # type: ignore[arg-type]
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def display(self, data: dict[str, str], raw: bool, display_id: bool) -> Cell:
        assert raw and display_id and not self.texts  # shown once, replaced afterwards
        self.texts.append(data["text/plain"])
        return self

    def update(self, data: dict[str, str], raw: bool) -> None:
        self.texts.append(data["text/plain"])


def test_a_short_run_is_silent_in_a_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = Cell(monkeypatch)
    with progress() as stage:
        stage("capture")
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "") and not cell.texts


def test_a_long_run_is_shown_in_a_notebook_and_how_long_it_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = Cell(monkeypatch)
    monkeypatch.setattr(progressing, "SHOWN", 0.0)
    monkeypatch.setattr(progressing, "OFTEN", 0.0)
    with pytest.raises(KeyboardInterrupt), progress() as stage:
        stage("refit a")
        raise KeyboardInterrupt
    assert cell.texts == ["fxmerge: refit a", "fxmerge: took 1 s"]
    assert capsys.readouterr() == ("", "")


def test_what_is_left_is_estimated_from_what_is_done() -> None:
    now = [0.0]
    estimate = Estimate(lambda: now[0])
    said = []
    for kind, time_, done in [
        ("survey", 0, 0.0), ("survey", 1, 0.5), ("survey", 3, 0.75),  # 0.75 in 3 s: 0.25 takes 1 s
        ("refit", 10, 0.0), ("refit", 20, 0.01), ("refit", 40, 0.1),  # 0.1 in 30 s: 0.9 takes 270 s
        ("refit", 41, 0.0), ("refit", 44, 0.5), ("verify", 50, 0.0),  # refit begins anew
    ]:  # fmt: skip
        now[0] = time_
        said.append(estimate.line(f"{kind} layer", done))
    assert said == [
        "survey layer", "survey layer", "survey, about 1 s left: layer",
        "refit layer", "refit layer", "refit, about 4 min left: layer",
        "refit layer", "refit, about 3 s left: layer", "verify layer",
    ]  # fmt: skip
    sweeping = Estimate(lambda: now[0])
    assert sweeping.line("50.0% of the FLOPs: refit a", 0.0) == "50.0% of the FLOPs: refit a"
    now[0] += 10
    assert sweeping.line("50.0% of the FLOPs: refit b", 0.2) == "50.0% of the FLOPs: refit, about 40 s left: b"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (9.4, "9 s"), (42, "40 s"), (61, "1 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
