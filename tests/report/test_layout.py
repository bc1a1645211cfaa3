"""Tables and paragraphs: their widths, what is left out, and the names, which are never lost."""

from __future__ import annotations

import random
import string

import pytest

from fxmerge.report.layout import Footnotes, Style, cut, length, lists, names, numbers, table, wrap
from fxmerge.report.tables import change, error, short

NAMES = [f"model.decoder.layers.{i}.{part}" for i in (0, 1, 10) for part in ("self_attn.k_proj", "mlp.down_proj")]
WIDE = ["模型.编码器.层.0.注意力", "модель.слой.0", "e\u0301cole.0.conv"]


def example(names_: list[str], style: Style, width: int) -> list[str]:
    count = len(names_)
    columns = [
        names("layer", names_),
        numbers("channels", [str(10**i) for i in range(count)]),
        numbers("parameters", [f"{10**9 + i:,}" for i in range(count)], ["1.00G"] * count),
        lists("consumers", [names_[: i + 1] for i in range(count)]),
    ]
    return table("A table of layers", columns, width, style)


@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize("width", [20, 21, 33, 40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_asked_and_no_name_is_lost(width: int, ascii: bool) -> None:
    for given in (NAMES, [*NAMES, "fc"], WIDE, ["x" * 90] * 3, ["a.b", ""], [f"blocks.{i}" for i in range(6)]):
        lines = example(given, Style(ascii), width)
        assert all(length(line) <= width for line in lines), lines
        assert not ascii or "\n".join(lines).isascii()
        start = next(at for at, line in enumerate(lines) if line and set(line) <= set("-─")) + 1
        for name, line in zip(given, lines[start : start + len(given)], strict=True):
            assert not name or line[0] == Style(ascii).clean(name)[0], (name, line)


def test_columns_that_do_not_fit_are_left_out_from_the_right_and_named() -> None:
    whole = example(NAMES, Style(), 300)
    assert whole[1].split() == ["layer", "channels", "parameters", "consumers"]
    assert NAMES[1] in whole[4] and "1,000,000,001" in whole[4] and f"{NAMES[0]}, {NAMES[1]}" in whole[4]
    assert len(whole) == 3 + len(NAMES)
    narrow = example(NAMES, Style(), 45)
    assert narrow[1].split() == ["layer", "channels", "parameters"] and "1.00G" in narrow[3]
    assert " ".join(narrow[-2:]) == "columns left out, as they do not fit: consumers"
    assert example(NAMES, Style(), 24)[1].split() == ["layer"]


def test_names_are_told_apart_where_half_of_the_width_is_enough() -> None:
    for width in (60, 80):
        rows = example(NAMES, Style(), width)[3 : 3 + len(NAMES)]
        assert len({row.split()[0] for row in rows}) == len(NAMES), rows


def test_a_cut_name_keeps_its_ends_and_its_numbers() -> None:
    name = "the_language_model.encoder.layer.11.attention.self.query"
    for width in range(16, len(name)):
        found = cut(name, width, Style())
        assert len(found) <= width and found.startswith("the") and found.endswith("query") and "…" in found
        assert ".11." in found or "…11" in found or width < 17
    assert cut(name, 20, Style()) == "the_la…11…self.query"
    assert cut(name, 20, Style(ascii=True)) == "the_lan...11...query"
    assert cut(name, len(name), Style()) == name
    assert cut("x" * 30, 9, Style()) == "xxxx…xxxx" and cut("x" * 30, 9, Style(ascii=True)) == "xxx...xxx"


def test_cutting_any_name_to_any_width() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        name = "".join(draw.choice(string.ascii_letters + "0123..层é\n\x1b") for _ in range(draw.randrange(60)))
        width, style = draw.randrange(1, 50), Style(draw.random() < 0.5)
        found = cut(name, width, style)
        assert length(found) <= width and found.isprintable()
        assert found == style.clean(name) if length(style.clean(name)) <= width else found


def test_lists_give_as_many_names_as_fit() -> None:
    column = lists("consumers", [["a", "b", "c"], [], ["encoder.layers.0.linear"]])
    assert [column.draw(0, w, Style()) for w in (7, 6, 4)] == ["a, b, c", "a +2", "a +2"]
    assert column.draw(0, 9, Style()) == "a, b, c" and column.draw(1, 9, Style()) == ""
    assert column.draw(2, 12, Style()).startswith("enc") and column.natural == 23


def test_equal_notes_are_printed_once() -> None:
    notes = Footnotes()
    for given in (["one"], [], ["two", "one"], ["one"]):
        notes.add(given)
    assert notes.marks == ["1", "", "2, 1", "1"]
    assert notes.lines(80, Style()) == ["1: one", "2: two"]
    lines = table("T", [names("layer", list("abcd")), numbers("n", ["1"] * 4), *notes.columns], 30, Style())
    assert lines[3:] == ["a      1  1", "b      1", "c      1  2, 1", "d      1  1"]
    empty = Footnotes()
    empty.add([])
    assert empty.columns == [] and empty.lines(80, Style()) == []


def test_paragraphs() -> None:
    assert wrap("parameters   1 -> 2", 40, Style()) == ["parameters   1 -> 2"]
    assert wrap("one two three", 8, Style(), 2) == ["one two", "  three"]
    assert wrap("/a/very/long/path.py", 8, Style()) == ["/a/very/", "long/pat", "h.py"]
    assert "".join(line.strip() for line in wrap("层" * 30, 21, Style(), 4)) == "层" * 30
    assert wrap("a\x1b[31m\tb", 40, Style()) == ["a\\x1b[31m\\tb"]


def test_short_numbers() -> None:
    given = [0, 7, 9_999, 10_000, 36_864, 303_104, 999_499, 1_179_648, 9_999_999, 114_032_640, 5_813_336_064, 10**12]
    shown = ["0", "7", "9,999", "10.0k", "36.9k", "303k", "999k", "1.18M", "10.0M", "114M", "5.81G", "1.00T"]
    assert [short(n) for n in given] == shown
    assert change(1024, 512) == "1,024 -> 512" and change(36_864, None, compact=True) == "36.9k -> -"
    errors = {0.0: "0.0000", 0.03481: "0.0348", 3e-6: "3e-06", float("nan"): "-", float("inf"): "-"}
    assert [error(e) for e in errors] == list(errors.values())
