"""The browser and its pages, for the tests of the report page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import CHROMIUM, Opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    tabs: list[Opened] = []

    def open_(text: str, **context: Any) -> Opened:
        path = tmp_path / f"{len(tabs)}.html"
        path.write_text(text, encoding="utf-8")
        tabs.append(Opened(browser, path, **context))
        return tabs[-1]

    yield open_
    for tab in tabs:
        tab.close()
