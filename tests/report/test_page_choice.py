"""What a reader chooses on the page: a group or a layer by click or by address, lists, colours, details."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest

import fxmerge
from tests.helpers.browser import ARROW, MINUS, TIMES, Opened, needs_chromium
from tests.helpers.drawings import blocks
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_chromium]


def members(group: Any) -> set[str]:
    return {m.layer.module for m in (*group.producers, *group.per_channel_params, *group.consumers)}


def opacities(tab: Opened, which: str) -> list[float]:
    return [float(value) for value in tab.all(which, "e => getComputedStyle(e).opacity")]


def inside(inner: dict[str, float], outer: dict[str, float]) -> bool:
    return all(inner[side] >= outer[side] - 1 for side in ("left", "top")) and all(
        inner[side] <= outer[side] + 1 for side in ("right", "bottom")
    )


def shown_whole(tab: Opened, group: Any) -> None:
    """The group's members are open, highlighted and in sight; all else is dimmed, on the map too."""
    found = tab.modules(".box.on")
    assert members(group) <= found
    assert not found & tab.modules(".box.closed")
    (window,) = tab.boxes("#canvas")
    assert all(inside(box, window) for box in tab.boxes(".box.on .body"))
    assert set(opacities(tab, ".box.on")) == {1.0}
    assert max(opacities(tab, ".box:not(.on, .via)")) < 0.4
    assert len(tab.all("#map .dot.on", "e => 1")) == len(tab.all(".box.on", "e => 1"))
    assert set(opacities(tab, "#map .dot.on")) == {1.0}
    assert max(opacities(tab, "#map .dot:not(.on, .via)")) < 0.4
    (shade,) = set(tab.all("#map .dot.on", "e => getComputedStyle(e).fill"))
    assert shade == tab.all("#panel h2 .swatch", "e => getComputedStyle(e).backgroundColor")[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 1024, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_link_opens_the_page_at_a_group(width: int, scheme: str, opened: Any) -> None:
    result = blocks()
    last = result.analysis.groups[-1]
    tab = opened(result.report.html(), width=width, fragment=f"#group:{last.name}", color_scheme=scheme)
    shown_whole(tab, last)
    assert tab.tab.inner_text("#panel h2") == last.name
    assert len(tab.all(".box.closed", "e => 1")) == 8  # only the modules of its members are open


def test_choosing_a_group_shows_its_members_and_is_kept_in_the_address(opened: Any) -> None:
    result = blocks()
    tab = opened(result.report.html())
    stream, first, last = (result.analysis.groups[at] for at in (0, 1, -1))
    for group in (last, first):
        tab.tab.click(f'.row[data-group="{result.analysis.groups.index(group)}"]')
        tab.tab.wait_for_selector("#back")
        shown_whole(tab, group)
        assert len(tab.all(".box.closed", "e => 1")) == 8  # the former choice's module is closed again
        assert tab.tab.evaluate("location.hash") == f"#group:{group.name}"
        tab.tab.click("#back")
        assert tab.tab.evaluate("location.hash") == ""
        assert set(opacities(tab, ".box")) == {1.0}
    tab.tab.click('.row[data-group="0"]')
    tab.tab.wait_for_selector("#back")
    shown_whole(tab, stream)
    tab.tab.reload()
    tab.tab.wait_for_selector("html[data-ready]")
    shown_whole(tab, stream)
    tab.tab.go_back()  # to the overview
    tab.tab.go_back()
    tab.tab.wait_for_selector("#back")
    shown_whole(tab, first)


@pytest.mark.slow
def test_what_the_reader_opened_stays_open(opened: Any) -> None:
    tab = opened(blocks().report.html())
    tab.tab.click(".box.closed >> nth=3")
    tab.settle()
    for group in (6, 7):
        tab.tab.click(f'.row[data-group="{group}"]')
        tab.tab.wait_for_selector("#back")
        assert {"blocks.3.0", "blocks.3.2"} <= tab.modules(".box:not(.closed)")
        tab.tab.click("#back")


def test_a_layer_is_kept_in_the_address(opened: Any) -> None:
    model, x = NETS["residual"]()
    tab = opened(plain_merge(model, x, ratio=0.5).report.html())
    tab.tab.click('.box[data-modules="fc"]')
    assert tab.tab.evaluate("location.hash") == "#fc"
    where = tab.tab.get_attribute("#scene", "transform")
    tab.tab.click('.box[data-modules="stem\\a n"] .name')
    assert tab.tab.evaluate("location.hash") == "#stem"
    assert tab.tab.get_attribute("#scene", "transform") == where  # what was clicked does not move
    tab.tab.keyboard.press("Escape")
    assert tab.tab.evaluate("location.hash") == ""
    tab.tab.evaluate("location.hash = '#group:nobody'")  # no such group, no such layer
    tab.tab.wait_for_timeout(100)
    assert tab.modules(".box.on") == set()


def parameters(module: Any, names: set[str]) -> int:
    own = dict(module.named_parameters())
    return sum(p.numel() for path, p in own.items() if path in names or path.rpartition(".")[0] in names)


def order(tab: Opened) -> list[int]:
    return [int(at) for at in tab.all("#list .row", "e => e.dataset.group ?? e.dataset.box")]


def falls(values: list[float]) -> bool:
    return all(a >= b for a, b in itertools.pairwise(values))


def test_groups_are_sorted_by_what_they_save_and_lose(opened: Any) -> None:
    model, x = NETS["projection"]()
    result = fxmerge.merge(model, x, ratio=0.5, refit="synthetic", samples=16)
    tab, groups = opened(result.report.html()), result.analysis.groups
    saved = [parameters(model, members(g)) - parameters(result.module, members(g)) for g in groups]
    assert not falls(saved)
    assert sorted(order(tab)) == list(range(len(groups)))
    assert falls([saved[at] for at in order(tab)])
    facts = tab.all("#list .fact", "e => e.textContent")
    assert facts == [f"saves {saved[at]:,}" for at in order(tab)]
    tab.tab.select_option("#lists select", "loss")
    after = {r.name: r.after for r in result.report.refitted if math.isfinite(r.after)}
    measured = [[after[name] for name in members(g) if name in after] for g in groups]
    lost = [sum(m) / len(m) if m else -1 for m in measured]
    assert not falls(lost)
    assert falls([lost[at] for at in order(tab)])
    tab.tab.select_option("#lists select", "order")
    assert order(tab) == list(range(len(groups)))
    tab.tab.click('.row[data-group="0"]')
    tab.tab.click("#back")
    assert order(tab) == list(range(len(groups)))  # the list is as it was left


def test_without_refit_the_loss_is_estimated_from_the_partners(opened: Any) -> None:
    result = blocks(decomposition="mostsim")
    tab, plans = opened(result.report.html()), {p.name: p for p in result.plan.groups}
    tab.tab.select_option("#lists select", "loss")
    lost = [sum(1 - p.cosine**2 for p in plans[g.name].partners) / g.channels for g in result.analysis.groups]
    assert len(set(lost)) > 1
    assert falls([round(lost[at], 4) for at in order(tab)])
    told = [float(t.rpartition(" ")[2]) for t in tab.all("#list .fact", "e => e.textContent")]
    assert told == pytest.approx([lost[at] for at in order(tab)], rel=0.06)


def test_lists_are_filtered(opened: Any) -> None:
    result = blocks()
    tab = opened(result.report.html())
    tab.tab.fill("#filter", "BLOCKS.7")
    names = [result.analysis.groups[at] for at in order(tab)]
    assert [g for g in result.analysis.groups if any("blocks.7" in name for name in members(g))] == sorted(
        names, key=result.analysis.groups.index
    )
    assert tab.tab.inner_text("#count") == f"{len(names)} of {len(result.analysis.groups)}"
    tab.tab.fill("#filter", "no such name")
    assert order(tab) == []
    tab.tab.keyboard.press("Escape")
    assert len(order(tab)) == len(result.analysis.groups)
    tab.tab.click("#tab-layers")
    tab.tab.fill("#filter", "blocks.7")
    assert tab.all("#list .row .title > span:first-child", "e => e.textContent") == ["blocks."] * 2


def test_two_bars_for_each_layer(opened: Any) -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5)
    tab, boxes = opened(result.report.html()), result.report.picture.boxes
    tab.tab.click("#tab-layers")
    names = [set(boxes[at].modules) for at in order(tab)]
    counts = [[parameters(m, names_) for m in (model, result.module)] for names_ in names]
    assert all(before > 0 for before, _ in counts)
    texts = tab.all("#list .two", "e => [...e.querySelectorAll('.number')].map(n => n.textContent)")
    for (before, after), (one, other) in zip(counts, texts, strict=True):
        assert one == f"{before:,}"
        assert other == f"{after:,} ({MINUS}{100 - 100 * after / before:.0f} %)"
    widths = tab.all("#list .two", "e => [...e.querySelectorAll('.bar span')].map(n => parseFloat(n.style.width))")
    most = max(before for before, _ in counts)
    assert [w for pair in widths for w in pair] == pytest.approx(
        [100 * n / most for pair in counts for n in pair], rel=1e-4
    )
    tab.tab.select_option("#lists select >> nth=0", "channels")
    texts = tab.all("#list .two", "e => e.querySelector('.number').textContent")
    assert texts == [str(boxes[at].before) for at in order(tab)]
    tab.tab.click('.row[data-box="1"]')
    tab.tab.wait_for_selector(".box.sought")
    assert tab.modules(".box.sought") == set(boxes[1].modules)


def test_widths_cannot_be_read_as_in_and_out_channels(opened: Any) -> None:
    model, x = NETS["residual"]()
    tab = opened(plain_merge(model, x, ratio=0.25, keep={"a": 4}).report.html())
    box = '.box[data-modules="a\\a an"]'
    assert tab.all(f"{box} .figure text", "e => e.textContent") == [f"16 {ARROW} 4 ({MINUS}75 %)"]
    (track,), (part,) = (tab.all(f"{box} .{which}", "e => e.getBBox().width") for which in ("track", "part"))
    assert part / track == pytest.approx(0.25)
    texts = tab.all(".box text, #panel *, header *", "e => e.childElementCount ? '' : e.textContent")
    arrows = [t for t in texts if ARROW in t]
    assert len(arrows) > 4
    assert not [t for t in arrows if not re.search(rf"\d( [kM])? {ARROW} [\d.,]+( [kM])? \({MINUS}[\d.]+ %\)", t)]


def test_weights_and_attributes_of_a_layer(opened: Any) -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5)
    tab = opened(result.report.html(), fragment="#b")
    rows = tab.all("#panel .weights tr, #panel .attributes tr", "e => [...e.children].map(c => c.textContent)")
    before, after = dict(model.state_dict()), dict(result.module.state_dict())
    for path in ("b.weight", "bn.weight", "bn.running_mean"):
        shapes = [TIMES.join(map(str, tensors[path].shape)) for tensors in (before, after)]
        assert shapes[0] != shapes[1]
        assert [path.partition(".")[2], *shapes] in rows, path
    conv, small = model.get_submodule("b"), result.module.get_submodule("b")
    assert ["in_channels", str(conv.in_channels), str(small.in_channels)] in rows
    assert ["kernel_size", "3, 3", "3, 3"] in rows
    changed = tab.all("#panel .changed th", "e => e.textContent")
    assert "in_channels" in changed
    assert "kernel_size" not in changed
    batch, _, *sides = model.stem(x).shape  # b has as many positions as the stem
    output = TIMES.join(map(str, (batch, conv.out_channels, *sides)))
    assert f"returned {output} float32" in tab.tab.inner_text("#panel")


def test_an_analysis_has_one_bar_and_no_losses(opened: Any) -> None:
    model, x = NETS["residual"]()
    tab = opened(fxmerge.analyze(model, x).report.html(), fragment="#b")
    assert tab.tab.is_disabled("#colour")
    assert "nothing was changed" in tab.tab.inner_text("#sentence")
    heads = tab.all("#panel .weights th[scope=col]", "e => e.textContent")
    assert heads[:2] == ["tensor", ""]
    tab.tab.click("#back")
    assert tab.all("#lists option", "e => e.value") == ["wide", "order"]
    tab.tab.click("#tab-layers")
    assert set(tab.all("#list .two", "e => e.querySelectorAll('.bar').length")) == {1}
    assert ARROW not in tab.tab.inner_text("body")


def tints(tab: Opened) -> dict[str, float]:
    """By box, how far its colour is from that of a box without any."""
    plain = "rgb(255, 255, 255)"
    found = tab.all(".box", "e => [e.dataset.modules, getComputedStyle(e.querySelector('.body')).fill]")

    def parts(text: str) -> list[float]:
        numbers = [float(n) for n in re.findall(r"[\d.]+", text.replace("srgb", ""))]
        return [n * (255 if text.startswith("color") else 1) for n in numbers[:3]]

    return {name: sum(abs(a - b) for a, b in zip(parts(fill), parts(plain), strict=True)) for name, fill in found}


def test_colours_by_saving(opened: Any) -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5)
    tab = opened(result.report.html(), color_scheme="light")
    assert max(tints(tab).values()) == 0
    tab.tab.select_option("#colour", "saving")
    names = {held: set(held.split("\n")) for held in tab.all(".box", "e => e.dataset.modules")}
    saved = {held: parameters(model, some) - parameters(result.module, some) for held, some in names.items()}
    found = tints(tab)
    assert [held for held, n in saved.items() if n == 0] == [held for held, tint in found.items() if tint < 1]
    ranked = sorted(saved, key=lambda held: saved[held])
    assert falls([-found[held] for held in ranked])
    assert f"{max(saved.values()):,} parameters saved" in tab.tab.inner_text("#legend")
    assert not any(tab.all(".stripe", "e => e.checkVisibility()"))
    tab.tab.select_option("#colour", "group")
    assert all(tab.all(".stripe", "e => e.checkVisibility()"))


def test_colours_by_error(opened: Any) -> None:
    model, x = NETS["residual"]()
    result = fxmerge.merge(model, x, ratio=0.5, refit="synthetic", samples=16)
    tab = opened(result.report.html(), color_scheme="light")
    tab.tab.select_option("#colour", "error")
    after = {r.name: r.after for r in result.report.refitted if math.isfinite(r.after)}
    errors = {held: max((after[n] for n in held.split("\n") if n in after), default=-1.0) for held in tints(tab)}
    assert len(set(errors.values())) > 2
    found = tints(tab)
    assert falls([-found[held] for held in sorted(errors, key=lambda held: errors[held])])
    worst = max(errors, key=lambda held: errors[held])
    text = tab.all(".box", "e => [e.dataset.modules, e.querySelector('.figure').textContent]")
    assert dict(text)[worst] == f"error {float(f'{errors[worst]:.2g}'):g}"
    assert "after refit" in tab.tab.inner_text("#legend")


def test_the_sentence_is_on_top(opened: Any) -> None:
    result = blocks()
    tab = opened(result.report.html())
    sentence = tab.tab.inner_text("#sentence")
    for part in ("without training", f"{len(result.plan.groups)} groups", "no data was used", "are off by"):
        assert part in sentence
    (one,), (network,) = tab.boxes("#sentence"), tab.boxes("#canvas")
    assert one["bottom"] <= network["top"]


@pytest.mark.slow
def test_too_many_members_to_show(opened: Any) -> None:
    tab = opened(blocks().report.html())
    tab.tab.evaluate("fx.LIMIT = 24")
    tab.tab.click('.row[data-group="0"]')
    tab.tab.wait_for_selector("#back")
    assert "too many" in tab.tab.inner_text("#status")
    assert "blocks.8.2" in tab.modules(".box.on")  # the closed module that contains it
    assert set(opacities(tab, ".box.on")) == {1.0}


@pytest.mark.slow
def test_a_group_in_many_modules_is_shown_by_them_first(opened: Any) -> None:
    tab = opened(blocks().report.html())
    tab.tab.evaluate("fx.ROOM = 8")  # the nine modules hold a box more each
    tab.tab.click('.row[data-group="0"]')
    tab.tab.wait_for_selector("#back")
    assert len(tab.all(".box.closed.on", "e => 1")) == 9
    assert tab.tab.inner_text("#open") == "Open 9 closed modules with members"
    tab.tab.click("#open")
    tab.tab.wait_for_selector("#open", state="detached")
    assert tab.all(".box.closed", "e => 1") == []
    (window,) = tab.boxes("#canvas")
    assert all(inside(box, window) for box in tab.boxes(".box.on .body"))
