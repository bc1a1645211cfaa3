"""Tables and paragraphs as plain text of a given width.

No terminal library draws them. Such a library adapts its output to the environment (a notebook, FORCE_COLOR, TERM),
but this text is returned to the caller and written to files.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

GAP = 2  # spaces between two columns
WIDTH = 20  # the least width of a text; numbers and short names fit
NAME = 16  # the least width of a name or a list of names that needs as much
HEAD = 3  # characters of its beginning that a name keeps, at least


@dataclass(frozen=True)
class Style:
    """The characters that a text may use: any, or those of ASCII only."""

    ascii: bool = False

    @property
    def mark(self) -> str:
        """What stands for the part of a name that was cut out."""
        return "..." if self.ascii else "…"

    @property
    def rule(self) -> str:
        """The character of the line below a table's header."""
        return "-" if self.ascii else "─"

    def clean(self, text: str) -> str:
        """The text with characters that cannot be shown, such as a line break in a name, written as escapes."""
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
        return shown.encode("ascii", "backslashreplace").decode("ascii") if self.ascii else shown


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    draw:     draw(row, width, style): the text of a cell, at most `width` characters wide
    natural:  the width at which every cell is shown in full
    least:    the width below which the column is left out
    right:    whether cells are aligned to the right
    stays:    whether the column is shown even where columns to its left are left out
    compact:  the same column with shorter cells, used where the table does not fit otherwise
    """

    header: str
    rows: int
    draw: Callable[[int, int, Style], str]
    natural: int
    least: int
    right: bool = False
    stays: bool = False
    compact: Column | None = None

    def width(self, natural: bool) -> int:
        """The natural or the least width, with room for the header or for its longest word."""
        if natural:
            return max(self.natural, length(self.header))
        return max(self.least, *map(length, self.header.split()))


def names(header: str, rows: Sequence[str], others: Sequence[int] = ()) -> Column:
    """The names of rows, cut in the middle where they are too long.

    others: for each row, the number of further names that it stands for, shown as ` +2`
    """
    more = [f" +{count}" if count else "" for count in others or [0] * len(rows)]

    def draw(row: int, width: int, style: Style) -> str:
        room = width - len(more[row])
        return cut(rows[row], room, style) + more[row] if room > 0 else cut(rows[row], width, style)

    styles = (Style(), Style(ascii=True))  # escapes are longer than what they stand for
    wide = [max(length(style.clean(name)) for style in styles) for name in rows]
    natural = max((w + len(m) for w, m in zip(wide, more, strict=True)), default=0)
    return Column(header=header, rows=len(rows), draw=draw, natural=natural, least=min(NAME, natural))


def lists(header: str, rows: Sequence[Sequence[str]]) -> Column:
    """Lists of names: as many as fit, and the number of the others, such as `conv1, conv2 +3`."""

    def draw(row: int, width: int, style: Style) -> str:
        given = [style.clean(name) for name in rows[row]]
        for count in range(len(given), 0, -1):
            text = ", ".join(given[:count]) + (f" +{len(given) - count}" if count < len(given) else "")
            if length(text) <= width:
                return text
        more = f" +{len(given) - 1}" if len(given) > 1 else ""
        return cut(given[0], width - len(more), style) + more if given else ""

    natural = max((length(", ".join(row)) for row in rows), default=0)
    return Column(header=header, rows=len(rows), draw=draw, natural=natural, least=min(NAME, natural))


def numbers(header: str, rows: Sequence[str], compact: Sequence[str] | None = None) -> Column:
    """Numbers, which are never cut.

    compact: the same numbers in a shorter form
    """
    wide = max(map(length, rows), default=0)
    short = numbers(header, compact) if compact is not None else None
    return Column(header=header, rows=len(rows), draw=lambda row, width, style: rows[row], natural=wide, least=wide,
                  right=True, compact=short)  # fmt: skip


@dataclass
class Footnotes:
    """Notes on the rows of a table. Equal notes are printed once, below the table."""

    texts: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)

    def add(self, notes: Sequence[str]) -> None:
        """The notes on the next row."""
        self.texts += [note for note in notes if note not in self.texts]
        self.marks.append(", ".join(str(self.texts.index(note) + 1) for note in notes))

    @property
    def columns(self) -> list[Column]:
        """A column with the numbers of each row's notes; empty if no row has a note."""
        wide = max(map(len, self.marks), default=0)
        column = Column(header="notes", rows=len(self.marks), draw=lambda row, width, style: self.marks[row],
                        natural=wide, least=wide, stays=True)  # fmt: skip
        return [column] if self.texts else []

    def lines(self, width: int, style: Style) -> list[str]:
        """The notes, by their numbers."""
        return [line for at, text in enumerate(self.texts, 1) for line in wrap(f"{at}: {text}", width, style, 3)]


def table(title: str, columns: Sequence[Column], width: int, style: Style, below: Sequence[str] = ()) -> list[str]:
    """The lines of a table, one for each row, and a line that names the columns that did not fit.

    columns: the names of the rows first
    below:   for each row, a paragraph that follows it
    """
    shown, widths = _fitted(columns, width, style)
    heads = [wrap(c.header, w, style) for c, w in zip(shown, widths, strict=True)]
    high = max(map(len, heads))
    lines = wrap(title, width, style)
    for at in range(high):  # headers stand on the line that is drawn below them
        lines.append(_line([head[at - high + len(head)] if at >= high - len(head) else "" for head in heads],
                           shown, widths))  # fmt: skip
    lines.append(style.rule * (sum(widths) + GAP * (len(widths) - 1)))
    for row in range(shown[0].rows):
        lines.append(_line([c.draw(row, w, style) for c, w in zip(shown, widths, strict=True)], shown, widths))
        lines += [f"    {line}" for line in wrap(below[row], width - 4, style)] if below else []
    headers = [c.header for c in shown]
    gone = [c.header for c in columns if c.header not in headers]
    if gone:
        lines += wrap(f"columns left out, as they do not fit: {', '.join(gone)}", width, style)
    return lines


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    parts = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        space = " " * (width - length(cell))
        parts.append(space + cell if column.right else cell + space)
    return (" " * GAP).join(parts).rstrip()


def _fitted(columns: Sequence[Column], width: int, style: Style) -> tuple[list[Column], list[int]]:
    """The columns that are shown, and their widths."""
    if columns[0].width(True) + sum(GAP + c.width(False) for c in columns[1:]) > width:
        columns = [c.compact or c for c in columns]
    first, *others = columns
    widest = min(first.width(True), width)
    shown, widths = [first], [min(_distinct(first, width, style), widest)]
    room = width - widths[0] - sum(GAP + c.width(False) for c in others if c.stays)
    full = False
    for column in others:
        needed = GAP + column.width(False)
        full = full or (not column.stays and needed > room)
        if column.stays or not full:
            room -= 0 if column.stays else needed
            shown.append(column)
            widths.append(needed - GAP)
    while shown[-1].stays and sum(widths) + GAP * (len(widths) - 1) > width and len(shown) > 1:
        del shown[-1], widths[-1]  # not even the columns that stay fit beside the names
    room = max(0, width - sum(widths) - GAP * (len(widths) - 1))
    grown = min(room, widest - widths[0])
    widths[0], room = widths[0] + grown, room - grown
    while room > 0 and (narrow := [at for at, c in enumerate(shown) if at and widths[at] < c.width(True)]):
        for at in narrow[:room]:  # by one each, so that all of them grow alike
            widths[at] += 1
            room -= 1
    return shown, widths


def _distinct(first: Column, width: int, style: Style) -> int:
    """The least width at which no two names look equal; a third of the table's width where that takes over half."""
    least, rows = min(NAME, width), range(first.rows)
    whole = len({first.draw(row, first.natural, style) for row in rows})
    for found in range(least, width // 2 + 1):
        if len({first.draw(row, found, style) for row in rows}) == whole:
            return found
    return max(least, width // 3)


def length(text: str) -> int:
    """The number of columns that a text takes on a terminal. East Asian characters are two columns wide."""
    return len(text) if text.isascii() else sum(_columns(c) for c in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(name: str, width: int, style: Style) -> str:
    """A name of at most this width. Where it is too long, parts of its middle are left out.

    The parts of a path that have no digits are left out first, since names of layers differ in numbers and endings.
    """
    name, mark = style.clean(name), style.mark[: max(width, 0)]
    if length(name) <= width:
        return name
    room = width - len(mark)
    first, *rest = name.split(".")
    if not rest:
        head = _within(name, room // 2)
        return head + mark + _ending(name, room - length(head))
    shown = [True] * len(rest)
    for at, part in enumerate(rest[:-1]):
        if length(_joined(rest, shown, mark)) + HEAD <= room:
            break
        shown[at] = any(c.isdigit() for c in part)
    body = _joined(rest, shown, mark)
    before = len(first) + sum(1 + len(part) for part in rest[: shown.index(True)])
    head = _within(name[:before], max(room - length(body), min(HEAD, room // 3)))
    return head + mark + _ending(body, room - length(head)).lstrip(f"{mark}.")


def _joined(parts: Sequence[str], shown: Sequence[bool], mark: str) -> str:
    """The parts of a path that are shown, with a mark where parts between them are left out."""
    text = ""
    for at, part in enumerate(parts):
        if shown[at]:
            text += ("." if shown[at - 1] else mark) + part if text else part
    return text


def _ending(text: str, width: int) -> str:
    """As much of a text's end as fits."""
    return _within(text[::-1], width)[::-1]


def _within(text: str, width: int) -> str:
    """As much of a text's beginning as fits."""
    taken = 0
    for at, character in enumerate(text):
        taken += _columns(character)
        if taken > width:
            return text[:at]
    return text


def wrap(text: str, width: int, style: Style, indent: int = 0) -> list[str]:
    """The lines of a paragraph. Words that are too long for a line are broken.

    indent: spaces before every line but the first
    """
    text = style.clean(text)
    if length(text) <= width:
        return [text]
    lines, line = [], ""
    for word in text.split():
        if line.strip() and length(line) + 1 + length(word) <= width:
            line += f" {word}"
            continue
        if line.strip():
            lines.append(line)
        line = " " * indent if lines else ""
        while length(line) + length(word) > width:
            part = _within(word, width - length(line)) or word[:1]
            lines.append(line + part)
            line, word = " " * indent, word[len(part) :]
        line += word
    return [*lines, line] if line.strip() else lines


def joined(tables: Sequence[Sequence[str]], totals: Sequence[str], width: int, style: Style) -> str:
    """Tables with an empty line after each, and below them the totals."""
    lines = [line for found in tables if found for line in (*found, "")]
    lines += [line for total in totals for line in wrap(total, width, style, 4)]
    return "\n".join(lines) + "\n"
