"""A notebook shows a small table, and a button that opens the page."""

from __future__ import annotations

import base64
import gzip
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxmerge.report.picture.notebook import cell
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Cells(HTMLParser):
    """The text of the cells of a table, and the page that the button holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.page, self.tags = "", set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "button":
            self.page = gzip.decompress(base64.b64decode(dict(attrs)["data-page"])).decode()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_figures_and_the_page() -> None:
    model, x = NETS["mlp"]()
    result = plain_merge(model, x, ratio=0.5)
    shown, report = Cells(result._repr_html_()), result.report
    size = (report.before.parameters, report.after.parameters)
    assert f"{size[0]:,} -> {size[1]:,} ({100 * size[1] / size[0]:.1f} % left)" in shown.texts
    assert f"{len(result.plan.groups)} of {len(result.analysis.groups)} merged" in shown.texts
    assert f"{report.verdict.error:.3g}" in shown.texts
    assert shown.page == report.html()
    assert Cells(result.analysis._repr_html_()).page == result.analysis.report.html()
    assert "script" not in shown.tags
    assert len(result._repr_html_()) < 0.4 * len(report.html())


def test_names_and_notes_are_text() -> None:
    found = Cells(cell("<b>&", [("<i>", "1 < 2")], ["</div><script>"], "<p>"))
    assert {"<b>&", "<i>", "1 < 2", "</div><script>"} <= set(found.texts)
    assert found.page == "<p>" and found.tags == {"div", "b", "table", "tr", "th", "td", "p", "button"}


def test_representations_are_one_line() -> None:
    model, x = NETS["mlp"]()
    result = plain_merge(model, x, ratio=0.5)
    for one in (result, result.report, result.analysis, result.analysis.report):
        assert len(repr(one).splitlines()) == 1 and len(repr(one)) < 120


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("tabs", slow_but([True], [True, False]))
def test_the_button_opens_the_page(tabs: bool, tmp_path: Path) -> None:
    """In a new tab; below the button where there are no new tabs."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    model, x = NETS["mlp"]()
    (tmp_path / "cell.html").write_text(plain_merge(model, x, ratio=0.5)._repr_html_(), encoding="utf-8")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.goto((tmp_path / "cell.html").as_uri())
        if tabs:
            with tab.expect_popup() as opening:
                tab.click("button")
            page = opening.value
        else:
            tab.evaluate("() => { window.open = () => null; }")
            tab.click("button")
            page = tab.frame_locator("iframe")
        page.locator(".box").first.wait_for(state="attached")
        assert re.search(r"parameters", page.locator("#summary").inner_text())
        browser.close()


def test_notices_are_shown() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).train()
    result = plain_merge(model, torch.randn(3, 4), ratio=0.5)
    assert any("training mode" in text for text in Cells(result._repr_html_()).texts)
