"""A curve as a self-contained SVG whose axes are labelled with round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 34, 52  # margins
_STYLE = (
    "text{font:13px sans-serif;fill:#333}.grid{stroke:#ddd}.curve{fill:none;stroke:#3465a4;stroke-width:2}"
    ".dot{fill:#3465a4}.level{stroke:#888;stroke-dasharray:5 4}.small{font-size:11px}"
)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * about >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def curve(
    points: Sequence[tuple[float, float]], title: str, across: str, up: str, level: tuple[float, str] | None = None
) -> str:
    """An SVG of the points (x, y), joined in the order of x.

    across, up:  labels of the x axis and of the y axis
    level:       height and label of a dashed horizontal line
    """
    ordered = sorted(points)
    heights = [y for _, y in ordered] + ([level[0]] if level else [])
    xs, ys = ticks(ordered[0][0], ordered[-1][0]), ticks(min(heights), max(heights))

    def place(x: float, y: float) -> tuple[float, float]:
        across_share, up_share = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across_share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up_share * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, content: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(content)}</text>'

    drawn = [text(LEFT, TOP - 14, title, "start")]
    for x in xs:
        at, bottom = place(x, ys[0])
        drawn.append(f'<path class="grid" d="M{at:.1f} {TOP}V{bottom:.1f}"/>')
        drawn.append(text(at, bottom + 18, f"{x:g}"))
    for y in ys:
        at = place(xs[0], y)[1]
        drawn.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(text(LEFT - 8, at + 4, f"{y:g}", "end"))
    drawn.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, across))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    drawn.append(text(18, middle, up, more=f' transform="rotate(-90 18 {middle:.1f})"'))
    if level:
        at = place(xs[0], level[0])[1]
        drawn.append(f'<path class="level" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(text(LEFT + 6, at + (14 if level[0] == max(heights) else -6), level[1], "start", ' class="small"'))
    placed = [place(x, y) for x, y in ordered]
    drawn.append('<path class="curve" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed) + '"/>')
    drawn += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in placed]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    ground = f'<style>{_STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([head + ground, *drawn, "</svg>", ""])
