"""The stages on a progress bar and in the log, with an estimate of the time that is left in a long one; how the garbage
collector is kept from slowing down a run.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

LOG = logging.getLogger("fxmerge")
SURE, LONG = 0.02, 2.0  # the share of a stage, and the seconds, that are known before the rest is estimated
SHOWN, OFTEN = 5.0, 0.5  # seconds before a notebook shows anything, and between two changes


class Stage(Protocol):
    """Takes the stage that a run has reached: its kind, and after a space what it is at, such as a layer.

    done: the share of the work of this kind of stage that is done, 0 to 1; 0 where it is not known
    """

    def __call__(self, name: str, done: float = 0.0, /) -> None: ...


def silent(name: str, done: float = 0.0) -> None:
    """A `Stage` that shows nothing."""


class Estimate:
    """How long the rest of a kind of stage takes, if its work goes on as it did.

    now: the time in seconds
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.kind = now, ""
        self.begun, self.first, self.done = 0.0, 0.0, 0.0

    def left(self, name: str, done: float) -> float | None:
        """The seconds that are left when this stage begins; None where too little is known."""
        kind, now = _divided(name)[0], self.now()
        if kind != self.kind or done < self.done:  # the first one of its kind, or the work is done once more
            self.kind, self.begun, self.first = kind, now, done
        self.done = done
        share, seconds = done - self.first, now - self.begun
        return seconds * (1 - done) / share if share >= SURE and seconds >= LONG else None

    def line(self, name: str, done: float) -> str:
        """The stage as it is shown."""
        left, (kind, what) = self.left(name, done), _divided(name)
        return name if left is None else f"{kind}, about {duration(left)} left: {what}"


def _divided(name: str) -> tuple[str, str]:
    """The kind of a stage, with what a sweep says before it, and what the stage is at."""
    before, mark, stage = name.rpartition(": ")
    kind, _, what = stage.partition(" ")
    return before + mark + kind, what


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h`: to two digits at most, as an estimate is."""
    if seconds < 60:
        return f"{max(1, round(seconds)) if seconds < 10 else 5 * round(seconds / 5)} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.2g} h"


@contextmanager
def progress() -> Iterator[Stage]:
    """Yields a `Stage` that shows the current stage, and in a long one what is left: `refit, about 40 s left: layer`.

    On a terminal that is one line, which is erased at the end, also after an error or Ctrl-C. In a notebook, a run of
    more than a few seconds shows it under its cell, and how long it took at the end. Nothing is shown where stderr is
    not a terminal that can erase a line: in a pipe, a file, or with TERM=dumb.

    Stages are also logged, by the logger `fxmerge` at level INFO.
    """
    if _in_notebook():
        yield from _under_a_cell()
    elif _on_terminal():
        yield from _on_a_line()
    else:
        yield _logged


def _on_a_line() -> Iterator[Stage]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    columns = (
        SpinnerColumn("line"),  # of ASCII characters
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="crop", ratio=1)),
    )
    console = Console(stderr=True, force_jupyter=False, force_terminal=True)
    piped = not _is_terminal(sys.stdout)  # what the user's model prints into a pipe or a file stays there
    with Progress(*columns, console=console, transient=True, expand=True, redirect_stdout=not piped) as bar:
        task, estimate = bar.add_task(""), Estimate()

        def show(name: str, done: float = 0.0) -> None:
            _logged(name)
            bar.update(task, description=estimate.line(name, done))

        yield show


def _under_a_cell(now: Callable[[], float] = time.monotonic) -> Iterator[Stage]:
    from IPython.display import display

    estimate, begun, shown = Estimate(now), now(), 0.0
    handle: Any = None

    def say(text: str) -> None:
        nonlocal handle
        plain = {"text/plain": f"fxmerge: {text}"}
        if handle is None:
            handle = display(plain, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            handle.update(plain, raw=True)

    def show(name: str, done: float = 0.0) -> None:
        nonlocal shown
        _logged(name)
        line, time = estimate.line(name, done), now()
        if time - begun >= SHOWN and time - shown >= OFTEN:
            shown = time
            say(line)

    try:
        yield show
    finally:
        if handle is not None:
            say(f"took {duration(now() - begun)}")


def _logged(name: str, done: float = 0.0) -> None:
    LOG.info(name)


def _in_notebook() -> bool:
    return hasattr(getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)(), "kernel")


def _on_terminal() -> bool:
    """Whether stderr is a terminal that can erase a line."""
    return os.environ.get("TERM", "") not in ("dumb", "unknown") and _is_terminal(sys.stderr)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


@contextmanager
def older_left_alone() -> Iterator[None]:
    """Keeps the garbage collector from walking the objects that exist on entry.

    Where the user has already frozen objects (`gc.freeze`), nothing is changed, as `gc.unfreeze` would thaw those too.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
