"""The report page opened in a real browser: Debian's headless Chromium, driven by playwright."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
MINUS, TIMES, ARROW = "\u2212", " \u00d7 ", "\u2192"  # as the page writes them
HEIGHTS = {390: 844, 1024: 768}  # of the window, by its width


class Opened:
    """A page in the browser, with its console messages, errors, dialogs and network requests."""

    def __init__(self, browser: Any, path: Path, width: int = 1400, fragment: str = "", **context: Any) -> None:
        self.said: list[str] = []
        window = {"width": width, "height": HEIGHTS.get(width, 900)}
        self.context = browser.new_context(viewport=window, reduced_motion="reduce", **context)
        self.tab = self.context.new_page()
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.said.append(dialog.message) or dialog.dismiss())
        self.tab.on("request", lambda request: self.said.append(request.url) if not self._own(request.url) else None)
        started = time.monotonic()
        self.tab.goto(path.as_uri() + fragment)
        self.tab.wait_for_selector("html[data-ready]", timeout=30_000)
        self.seconds = time.monotonic() - started

    @staticmethod
    def _own(url: str) -> bool:
        return url.startswith(("file:", "data:", "blob:"))

    def modules(self, which: str) -> set[str]:
        return {m for held in self.all(which, "e => e.dataset.modules") for m in held.split("\n")}

    def all(self, which: str, what: str) -> list[Any]:
        return self.tab.eval_on_selector_all(which, f"all => all.map({what})")  # type: ignore[no-any-return]

    def boxes(self, which: str) -> list[dict[str, float]]:
        """The bounding boxes of the elements, as {left, right, top, bottom}."""
        sides = "{left, right, top, bottom}"
        return self.all(which, f"e => {{ const {sides} = e.getBoundingClientRect(); return {sides}; }}")

    def settle(self) -> None:
        self.tab.wait_for_function("document.getElementById('status').textContent === ''")

    def close(self) -> None:
        self.context.close()
        assert not self.said, self.said[:3]
