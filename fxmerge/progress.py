"""The stages on a progress bar and in the log; how the garbage collector is kept from slowing down a run."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LOG = logging.getLogger("fxmerge")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows the current stage, given as `stage` or `stage group`, on one line of the terminal.

    The line is erased at the end, also after an error or Ctrl-C. Nothing is shown where stderr is not a terminal that
    can erase a line: in a pipe, a file, a notebook, or with TERM=dumb.

    Stages are also logged, by the logger `fxmerge` at level INFO.
    """
    if not _on_terminal():
        yield LOG.info
        return
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
        task = bar.add_task("")

        def show(stage: str) -> None:
            LOG.info(stage)
            bar.update(task, description=stage)

        yield show


def _on_terminal() -> bool:
    """Whether stderr is a terminal that can erase a line. A notebook's stderr may be called one, but is a cell."""
    notebook = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if hasattr(notebook, "kernel") or os.environ.get("TERM", "") in ("dumb", "unknown"):
        return False
    return _is_terminal(sys.stderr)


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
