"""The HTML page in a real browser: Debian's headless Chromium, driven by playwright. No network, no console errors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fxmerge
from benchmarks.demo.picture import screenshot
from fxmerge.report.picture.page import page
from fxmerge.report.picture.records import Picture
from tests.helpers.browser import MINUS, Opened, needs_chromium
from tests.helpers.drawings import NASTY, Named, blocks, nasty, wide
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.slow import slow_but

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_chromium]


def merged(name: str, **options: Any) -> fxmerge.Result:
    model, x = NETS[name]()
    return plain_merge(model, x, **{"ratio": 0.5, "decomposition": "mostsim"} | options)


@pytest.mark.parametrize("name", slow_but(["residual"], ["residual", "dense", "projection", "chain_1d"]))
def test_choosing_a_group_highlights_exactly_its_members(name: str, opened: Any) -> None:
    result = merged(name)
    tab = opened(result.report.html())
    assert tab.all(".box.on", "e => 1") == []
    names = {layer.node: layer.module for layer in result.analysis.facts.layers}
    for number, g in enumerate(result.analysis.groups):
        members = {m.layer.module for m in (*g.producers, *g.per_channel_params, *g.consumers)}
        others = {names.get(node, node) for node in (*g.mixers, *g.ties)}
        tab.tab.click(f'.row[data-group="{number}"]')
        found = tab.modules(".box.on")
        boxes = [set(b.modules) for b in result.report.picture.boxes if set(b.modules) & (members | others)]
        assert members <= found
        assert found == set().union(*boxes)
        wires = [set(held.split()) for held in tab.all(".wire.on", "e => e.dataset.groups")]
        assert wires or not g.consumers
        assert all(str(number) in held for held in wires)
        assert not any(str(number) in held.split() for held in tab.all(".wire:not(.on)", "e => e.dataset.groups"))
        tab.tab.click("#back")
        assert tab.all(".box.on", "e => 1") == []


def test_clicking_and_pointing_in_the_network(opened: Any) -> None:
    tab = opened(merged("residual").report.html())
    box = '.box[data-modules="a\\nan"]'.replace("\\n", "\\a ")
    tab.tab.hover(box)
    assert tab.modules(".box.on") == {"a", "an", "b", "bn"}
    tab.tab.mouse.move(3, 880)
    assert tab.modules(".box.on") == set()
    tab.tab.click(box, position={"x": 40, "y": 20})
    tab.tab.mouse.move(3, 880)
    assert tab.modules(".box.on") == {"a", "an", "b", "bn"}
    panel = tab.tab.inner_text("#panel")
    assert "16 → 8" in panel
    titles = ("Producers", "Per-channel parameters", "Consumers", "Similarity", "FLOPs")
    for text in ("producer, per-channel parameter of", *titles):
        assert text in panel, text
    tab.tab.click(f'{box} .stripe[data-group="0"]')  # its upper edge: the stream that it consumes
    tab.tab.mouse.move(3, 880)
    assert tab.modules(".box.on") == {"stem", "n", "a", "an", "b", "bn", "add", "fc"}
    tab.tab.keyboard.press("Escape")
    assert tab.modules(".box.on") == set()


@pytest.mark.slow
def test_summary_partners_and_heat_map(opened: Any) -> None:
    result = merged("residual")
    tab = opened(result.report.html())
    summary = tab.tab.inner_text("#summary")
    assert "parameters" in summary
    assert "output error" in summary
    left = result.report.after.parameters / result.report.before.parameters
    assert f"{MINUS}{100 - 100 * left:.0f} %" in summary
    for number, plan in enumerate(result.plan.groups):
        tab.tab.click(f'.row[data-group="{number}"]')
        lines = tab.all(".partners path", "e => 1")
        merged_ = [p for p in plan.partners if p.into >= 0]
        assert len(lines) == len(merged_) > 0
        texts = tab.all(".partners text", "e => e.textContent")
        told = {tuple(map(float, t[2:].split(", "))) for t in texts if ", " in t and t[2].isdigit()}
        for p in merged_:
            assert any(abs(p.scale - s) < 0.006 and abs(p.cosine - c) < 0.006 for s, c in told), p
        assert {str(p.channel) for p in merged_} | {str(p.into) for p in merged_} <= set(texts)
        pixels = tab.tab.evaluate(
            "() => { const c = document.querySelector('canvas');"
            " return [c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }"
        )
        n, flat = pixels[0], torch.tensor(pixels[1]).reshape(pixels[0], pixels[0], 4)
        assert n == plan.channels
        assert torch.equal(flat, flat.transpose(0, 1))
        assert torch.equal(flat[0, 0], flat[n - 1, n - 1])
        tab.tab.click("#back")


@pytest.mark.slow
def test_collapse_and_expand(opened: Any) -> None:
    result = blocks()
    tab = opened(result.report.html())
    every = {m for b in result.report.picture.boxes for m in b.modules}
    assert tab.modules(".box.closed") == {f"blocks.{i}.{j}" for i in range(9) for j in (0, 2)}  # an overview at first
    assert tab.modules(".box") == every
    tab.tab.keyboard.press("c")
    tab.settle()
    assert len(tab.all(".frame", "e => 1")) == 0
    assert len(tab.all(".box", "e => 1")) < 15
    assert tab.modules(".box") == every  # a collapsed box lists the modules in it
    tab.tab.click(".box.closed")
    tab.settle()
    assert len(tab.all(".box.closed", "e => 1")) > 0
    tab.tab.click("#expand")
    tab.settle()
    tab.tab.click("#expand")
    tab.settle()
    assert tab.modules(".box:not(.closed)") == every
    tab.tab.locator(".title", has_text="3").first.click()
    tab.settle()
    assert len(tab.all(".box.closed", "e => 1")) == 1
    tab.tab.click('.row[data-group="0"]')
    tab.settle()
    assert "blocks.3.0" in tab.modules(".box.on:not(.closed)")  # choosing a group opens what hides its members


def test_search_opens_what_it_finds(opened: Any) -> None:
    tab = opened(blocks().report.html())
    tab.tab.click("#collapse")
    tab.settle()
    tab.tab.keyboard.press("/")
    tab.tab.keyboard.type("blocks.7")
    assert tab.all("#found li", "e => e.textContent") == ["blocks.7.0", "blocks.7.2"]
    tab.tab.keyboard.press("ArrowDown")
    tab.tab.keyboard.press("Enter")
    tab.tab.wait_for_selector(".box.sought")
    assert tab.modules(".box.sought") == {"blocks.7.2"}
    assert "blocks.7.2" in tab.tab.inner_text("#panel")
    box, stage = tab.tab.locator(".box.sought").bounding_box(), tab.tab.locator("#network").bounding_box()
    assert stage["x"] <= box["x"] <= stage["x"] + stage["width"]
    assert stage["y"] <= box["y"] <= stage["y"] + stage["height"]
    tab.tab.fill("#search", "nothing of that name")
    assert tab.tab.inner_text("#status") == "no layer matches"


def test_a_link_opens_the_page_at_a_layer(opened: Any, tmp_path: Path) -> None:
    tab = opened(merged("residual").report.html())
    tab.tab.goto(f"{tab.tab.url}#b")
    tab.tab.wait_for_selector(".box.sought")
    assert tab.modules(".box.sought") == {"b", "bn"}
    tab.tab.goto(f"{tab.tab.url.partition('#')[0]}#%")
    tab.tab.reload()
    tab.tab.wait_for_selector("html[data-ready]")
    assert tab.modules(".box.sought") == set()


@pytest.mark.slow
def test_the_picture_of_the_readme_is_a_photograph(tmp_path: Path) -> None:
    merged("residual").report.html(tmp_path / "page.html")
    screenshot(tmp_path / "page.html", "b", tmp_path / "page.png")
    data = (tmp_path / "page.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [1500, 950]


def test_all_of_it_by_keyboard(opened: Any) -> None:
    tab = opened(merged("residual").report.html())
    tab.tab.focus("#theme")
    seen = []
    for _ in range(12):
        tab.tab.keyboard.press("Tab")
        seen.append(tab.tab.evaluate("document.activeElement.dataset.modules || ''"))
    assert [s for s in seen if s][:4] == ["x", "stem\nn", "a\nan", "b\nbn"]
    tab.tab.focus(".box:nth-of-type(3)")
    tab.tab.keyboard.press("Enter")
    assert tab.modules(".box.on") == {"a", "an", "b", "bn"}
    before = tab.tab.get_attribute("#scene", "transform")
    tab.tab.keyboard.press("+")
    zoomed = tab.tab.get_attribute("#scene", "transform")
    tab.tab.keyboard.press("ArrowDown")
    assert len({before, zoomed, tab.tab.get_attribute("#scene", "transform")}) == 3
    tab.tab.keyboard.press("Escape")
    assert tab.modules(".box.on") == set()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(scheme: str, opened: Any) -> None:
    tab = opened(merged("residual").report.html(), color_scheme=scheme)

    def lightness() -> tuple[float, float]:
        colours = tab.tab.evaluate(
            "() => [getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('.box text')).fill]"
        )
        back, ink = (sum(map(float, c[4:-1].split(","))) / 765 for c in colours)
        return back, ink

    back, ink = lightness()
    assert (back > 0.9 and ink < 0.2) if scheme == "light" else (back < 0.2 and ink > 0.8)
    tab.tab.keyboard.press("d")
    back, ink = lightness()
    assert (back < 0.2 and ink > 0.8) if scheme == "light" else (back > 0.9 and ink < 0.2)


def test_refused_groups_are_hatched_and_tell_why(opened: Any) -> None:
    result = merged("residual", scope="internal")
    tab = opened(result.report.html())
    fills = dict(tab.all(".stripe[data-group]", "e => [e.dataset.group, e.getAttribute('fill')]"))
    assert fills == {"0": "url(#hatch0)", "1": result.report.picture.shades[1].colour}
    assert "fc" in tab.modules(".box.refused")
    tab.tab.click('.row[data-group="0"]')
    assert "is excluded by scope" in tab.tab.inner_text("#panel .refusal")


def overlapping(tab: Opened) -> list[tuple[str, str]]:
    found = tab.all(".box", "e => { const b = e.querySelector('.body').getBoundingClientRect();"
                    " return [e.dataset.modules, b.left, b.top, b.right, b.bottom]; }")  # fmt: skip
    return [
        (a[0], b[0])
        for i, a in enumerate(found)
        for b in found[:i]
        if min(a[3], b[3]) - max(a[1], b[1]) > 0.5 and min(a[4], b[4]) - max(a[2], b[2]) > 0.5
    ]


@pytest.mark.parametrize("name", ["residual", "dense", "projection"])
def test_nothing_overlaps_and_text_fits(name: str, opened: Any) -> None:
    tab = opened(merged(name).report.html())
    assert overlapping(tab) == []
    spilling = tab.all(
        ".box",
        "e => { const b = e.querySelector('.body').getBoundingClientRect();"
        " return [...e.querySelectorAll('text')].map(t => t.getBoundingClientRect())"
        " .some(t => t.left < b.left || t.right > b.right); }",
    )
    assert not any(spilling)


def test_data_flows_down(opened: Any) -> None:
    tab = opened(merged("residual").report.html())
    tops = dict(tab.all(".box", "e => [e.dataset.modules.split('\\n')[0], e.getBoundingClientRect().top]"))
    assert tops["x"] < tops["stem"] < tops["a"] < tops["b"] < tops["add"] < tops["fc"] < tops["output"]


def panels_of(picture: Picture) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lists = ("producers", "per_channel_params", "consumers", "mixers", "ties", "scaleBlocks", "refit", "partners")
    plain: dict[str, Any] = {key: [] for key in lists}
    like = {"channels": [0], "kept": "1", "cosines": ""}
    costs = {"parameters": [1], "flops": [1]}
    counts = {**costs, "similarity": 1.0, "estimate": 0.0, "dropped": 0, "unpartnered": 0}
    layer = {"op": NASTY[1], "output": [1, 4], "dtype": NASTY[1]}
    tables = {"weights": [[NASTY[1], [4, 4]]], "attributes": [[NASTY[1], NASTY[1]]]}
    layers = [{**costs, "layers": [{**layer, **tables}]} for _ in picture.boxes]
    return [{**plain, **counts, "likeness": like} for _ in picture.shades], layers


@pytest.mark.slow
def test_names_do_no_harm(opened: Any) -> None:
    for text in (
        fxmerge.analyze(Named().eval(), torch.randn(1, 3, 2, 2)).report.html(),
        page(nasty(), {"parameters": [1], "flops": [1]}, *panels_of(nasty())),
    ):
        tab = opened(text)
        assert tab.tab.evaluate("document.querySelectorAll('script').length") == text.count("<script")
        assert any("<script>alert(1)</script>" in held for held in tab.modules(".box"))
        tab.tab.click(".box >> nth=1")
        tab.tab.click('.row[data-group="0"]')
        tab.tab.keyboard.press("/")
        tab.tab.keyboard.type("<script>")
        tab.tab.keyboard.press("Enter")
        tab.tab.wait_for_selector(".box.sought")


@pytest.mark.slow
def test_ten_thousand_layers_open_and_stay_usable(opened: Any) -> None:
    picture = wide(10_000)
    text = page(picture, {"parameters": [1], "flops": [1]}, *panels_of(picture))
    assert len(text) < 5e6
    tab = opened(text)
    assert tab.seconds < 10  # about 1.5 s on an idle machine
    assert len(tab.all(".box", "e => 1")) < 200
    tab.tab.keyboard.press("e")
    tab.settle()
    assert len(tab.all(".box", "e => 1")) <= 450
    tab.tab.fill("#search", "n7777")
    tab.tab.keyboard.press("Enter")
    tab.tab.wait_for_selector(".box.sought")
    assert tab.modules(".box.sought") == {"n7777"}


LARGE = {
    "vgg16": (1, 3, 64, 64),
    "resnet152": (1, 3, 64, 64),
    "densenet201": (1, 3, 64, 64),
    "vit_l_16": (1, 3, 224, 224),
    "maskrcnn_resnet50_fpn": (3, 128, 128),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_models_open_at_once(name: str, opened: Any) -> None:
    models = pytest.importorskip("torchvision.models")
    recorded = "rcnn" in name
    options = {"weights_backbone": None, "min_size": 200, "max_size": 200} if recorded else {}
    model = models.get_model(name, weights=None, **options).eval()
    x: Any = torch.rand(LARGE[name])
    text = fxmerge.analyze(model, ([x],) if recorded else x).report.html()
    assert len(text.encode()) < 5e6
    tab = opened(text)
    assert tab.seconds < 3
    assert overlapping(tab) == []
    tab.tab.keyboard.press("e")
    tab.settle()
    assert overlapping(tab) == []
    before = time.monotonic()
    tab.tab.click('.row[data-group="0"]')
    tab.tab.wait_for_selector("#back")
    assert tab.modules(".box.on")
    assert time.monotonic() - before < 3  # with a layout; 0.5 s on an idle machine
    tab.tab.click("#back")
    tab.tab.click("#tab-layers")
    assert time.monotonic() - before < 6
