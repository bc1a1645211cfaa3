"""The page at three widths, in light and dark: nothing overlaps or spills, all is legible; and what it saves."""

from __future__ import annotations

import io
import itertools
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fxmerge
from fxmerge.refit.records import NO_BETTER
from tests.helpers.browser import Opened, needs_chromium
from tests.helpers.drawings import blocks
from tests.helpers.netmaking import one_thread  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.slow import slow_but

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_chromium]

SVG = "{http://www.w3.org/2000/svg}"
WIDTHS = slow_but([1400, 390], [1400, 1024, 390])


@pytest.fixture(scope="module")
def text() -> str:
    return blocks().report.html()


def apart(one: dict[str, float], other: dict[str, float]) -> bool:
    across = one["right"] <= other["left"] + 1 or other["right"] <= one["left"] + 1
    return across or one["bottom"] <= other["top"] + 1 or other["bottom"] <= one["top"] + 1


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_covers_the_network_and_nothing_spills(width: int, text: str, opened: Any) -> None:
    tab = opened(text, width=width)
    steps = ["#tab-layers", "#tab-refusals", "#tab-groups", '.row[data-group="3"]', ".chips button", "#colour"]
    for step in steps:
        if step == "#colour":
            tab.tab.select_option(step, "saving")
        else:
            tab.tab.click(step)
        tab.settle()
        tab.tab.evaluate("scrollTo(0, 0)")
        wide = tab.tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] == width, step
        assert tab.tab.evaluate("(p => p.scrollWidth <= p.clientWidth)(document.querySelector('#panel'))"), step
        spilling = tab.all("header *, #panel *, footer *", "e => e.getBoundingClientRect().right")
        assert max(spilling) <= width + 1, step
        parts = ["header", "#canvas", "footer", "#panel"] + (["#map"] if width > 800 else [])
        found = {part: tab.boxes(part)[0] for part in parts}
        for one, other in itertools.combinations(parts, 2):
            assert apart(found[one], found[other]), (one, other, step)
        tools = tab.boxes("#tools button, #tools input, #tools select")
        assert all(apart(a, b) for a, b in itertools.combinations(tools, 2))


@pytest.mark.parametrize("width", WIDTHS)
def test_long_texts_do_not_widen_the_panel(width: int, opened: Any) -> None:
    model, x = NETS["residual"]()
    report = fxmerge.merge(model, x, ratio=0.5, refit="synthetic", samples=16).report
    noted = replace(report, refitted=[replace(r, after=r.before, note=NO_BETTER) for r in report.refitted])
    tab = opened(noted.html(), width=width)
    for number in range(len(report.groups)):
        tab.tab.click(f'.row[data-group="{number}"]')
        tab.tab.wait_for_selector("#back")
        assert NO_BETTER in tab.tab.inner_text("#panel")
        assert tab.tab.evaluate("(p => p.scrollWidth <= p.clientWidth)(document.querySelector('#panel'))")
        tab.tab.click("#back")


@pytest.mark.parametrize("width", WIDTHS)
def test_keyboard_hints_do_not_cover_the_network(width: int, text: str, opened: Any) -> None:
    tab = opened(text, width=width)
    assert tab.tab.is_visible("#keys") == (width > 800)  # a phone has no keys
    if width > 800:
        assert apart(tab.boxes("#keys")[0], tab.boxes("#network")[0])


def test_on_a_phone_the_network_stays_in_sight(text: str, opened: Any) -> None:
    tab = opened(text, width=390, has_touch=True)
    last = tab.tab.locator("#list .row").last
    last.scroll_into_view_if_needed()
    assert tab.tab.evaluate("scrollY") > 300
    (stage,) = tab.boxes("#stage")
    assert stage["top"] == pytest.approx(0, abs=1)
    assert 0.3 * 844 < stage["bottom"] < 0.6 * 844
    last.tap()
    tab.tab.wait_for_selector("#back")
    (canvas,) = tab.boxes("#canvas")
    for box in tab.boxes(".box.on .body"):
        assert canvas["top"] - 1 <= box["top"] < box["bottom"] <= canvas["bottom"] + 1
    assert tab.boxes("#panel h2")[0]["top"] >= tab.boxes("#stage")[0]["bottom"] - 1  # the details are not covered
    small = tab.all("button, select, input", "e => e.checkVisibility() && e.getBoundingClientRect().height")
    assert min(height for height in small if height) >= 32


LEGIBLE = """
(which) => [...document.querySelectorAll(which)]
.filter(e => !e.childElementCount && e.textContent.trim() && e.checkVisibility()).map(e => {
  const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = (colours) => {
    pen.clearRect(0, 0, 1, 1);
    colours.forEach(c => { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); });
    const light = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  };
  const behind = [];
  for (let p = e; p; p = p.parentElement) behind.unshift(getComputedStyle(p).backgroundColor);
  const body = e.closest(".box")?.querySelector(".body");
  if (body) behind.push(getComputedStyle(body).fill);
  const ink = e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color;
  const [one, other] = [over(behind), over([...behind, ink])].sort((a, b) => b - a);
  return [(one + 0.05) / (other + 0.05), e.textContent.slice(0, 40)];
})
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("by", ["group", "error", "saving"])
def test_texts_are_legible(by: str, scheme: str, text: str, opened: Any) -> None:
    tab = opened(text, color_scheme=scheme)
    tab.tab.select_option("#colour", by)
    which = ".box text, .title text, header *, footer *, #panel *"
    for step in ("#tab-layers", "#tab-groups", '.row[data-group="3"]', ".chips button"):
        tab.tab.click(step)
        tab.settle()
        found = tab.tab.evaluate(f"({LEGIBLE})({which!r})")
        assert len(found) > 40
        assert min(found)[0] >= 4.5, min(found)  # WCAG AA


def test_every_control_has_a_name_and_a_visible_focus(text: str, opened: Any) -> None:
    tab = opened(text)
    for step in ("#tab-layers", "#tab-groups", '.row[data-group="3"]'):
        tab.tab.click(step)
        tab.tab.wait_for_selector("#back" if "row" in step else "#lists")
        unnamed = tab.all(
            "button, input, select, [role=button], [role=tab]",
            "e => e.ariaLabel || e.title || e.textContent.trim() || e.labels?.length ? '' : e.outerHTML",
        )
        assert not any(unnamed)
    for which in ("#theme", "#back", "#colour"):
        tab.tab.keyboard.press("Tab")  # a focus by key is shown
        tab.tab.focus(which)
        style = tab.tab.evaluate(f"getComputedStyle(document.querySelector('{which}')).outlineStyle")
        assert style == "solid", which


def test_tabs_by_keyboard(text: str, opened: Any) -> None:
    tab = opened(text)
    tab.tab.focus("#tab-groups")
    for name in ("layers", "refusals", "groups"):
        tab.tab.keyboard.press("ArrowRight")
        assert tab.tab.evaluate("document.activeElement.id") == f"tab-{name}"
        assert tab.all("[aria-selected=true][role=tab]", "e => e.id") == [f"tab-{name}"]
    tab.tab.keyboard.press("ArrowLeft")
    assert tab.tab.evaluate("document.activeElement.id") == "tab-refusals"


def saved(tab: Opened, button: str) -> bytes:
    with tab.tab.expect_download() as download:
        tab.tab.click(button)
    assert download.value.suggested_filename.startswith("Blocks.")
    return Path(download.value.path()).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_png_and_svg_hold_the_whole_drawing(scheme: str, text: str, opened: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    tab = opened(text, color_scheme=scheme)
    tab.tab.click('.row[data-group="5"]')
    tab.tab.wait_for_selector("#back")
    drawn = tab.tab.evaluate("[fx.scene.laid.width, fx.scene.laid.height]")
    root = ET.fromstring(saved(tab, "#svg"))
    assert root.get("viewBox") == "-24 -24 " + " ".join(f"{side + 48:g}" for side in drawn)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert sorted(t for t in texts if t) == sorted(t for t in tab.all("#network text", "e => e.textContent") if t)
    assert "url(http" not in ET.tostring(root, "unicode")
    picture = image.open(io.BytesIO(saved(tab, "#png"))).convert("RGB")
    assert picture.size == pytest.approx([2 * (side + 48) for side in drawn], abs=1)
    colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
    back = max(colours, key=lambda colour: colours[colour])
    assert (sum(back) > 700) == (scheme == "light")
    group = tuple(int(tab.tab.evaluate("fx.data.groups[5].colour")[at : at + 2], 16) for at in (1, 3, 5))
    assert colours.get(group, 0) > 1000  # the chosen group is not dimmed


@pytest.mark.slow
def test_the_pdf_is_as_large_as_the_drawing(text: str, opened: Any, tmp_path: Path) -> None:
    tab = opened(text, color_scheme="dark")
    before = tab.tab.get_attribute("#scene", "transform")
    width, height = tab.tab.evaluate("[fx.scene.laid.width, fx.scene.laid.height]")
    tab.tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    tab.tab.emulate_media(media="print")
    box = tab.boxes("#network")[0]
    assert box["right"] - box["left"] == pytest.approx(width, abs=1)
    assert box["bottom"] - box["top"] == pytest.approx(height, abs=1)
    assert not tab.tab.is_visible("#tools")
    assert tab.tab.is_visible("#sentence")
    assert tab.tab.evaluate("document.documentElement.dataset.theme") == "light"
    tab.tab.emulate_media(media="screen")
    tab.tab.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert tab.tab.get_attribute("#scene", "transform") == before
    assert tab.tab.evaluate("document.documentElement.dataset.theme") == "dark"
    data = tab.tab.pdf(prefer_css_page_size=True, print_background=True)
    assert data[:5] == b"%PDF-"
    sides = [[float(n) for n in found.split()] for found in re.findall(rb"/MediaBox \[0 0 ([\d. ]+)\]", data)]
    assert sides[0][0] >= 0.75 * width  # 0.75 points are a pixel
    assert sides[0][1] >= 0.75 * height
