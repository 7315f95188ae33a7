"""Line charts as SVG text, in the colours of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
POINTS = 400  # more than that many steps are thinned: a phone has no more pixels
COLOURS = 6


class Line(NamedTuple):
    """A line of a chart; `band` is how far its area reaches to both sides of each y."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] | None = None
    dashed: bool = False


def chart(title: str, lines: Sequence[Line]) -> str:
    """An SVG of the lines over one x axis, with a legend where there are several.

    Values that are not finite leave a gap. Returns "" if there is nothing to draw.
    """
    lines = [thinned(line) for line in lines]
    xs = [x for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    ys = [edge for line in lines for edge in edges(line)]
    if not xs:
        return ""
    x_low, x_high = min(xs), max(xs)
    ticks = nice_ticks(min(ys), max(ys))
    # An end that no value comes near is left out: -0.1 to 9 needs no room down to -5.
    room = 0.15 * (ticks[1] - ticks[0])
    y_low, y_high = max(ticks[0], min(ys) - room), min(ticks[-1], max(ys) + room)
    ticks = [tick for tick in ticks if y_low <= tick <= y_high]
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def at(x: float, y: float) -> str:
        right = LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)
        if x_high == x_low:
            right = (LEFT + WIDTH - RIGHT) / 2
        return f"{right:.1f},{TOP + (y_high - y) / y_span * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
    ]
    for tick in ticks:
        height = at(x_low, tick).partition(",")[2]
        parts.append(f'<path class="grid" d="M{LEFT} {height}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{height}" dy="4" text-anchor="end">{short(tick)}</text>'
        )
    for tick in whole_ticks(x_low, x_high):
        place = at(tick, y_low).partition(",")[0]
        parts.append(f'<text x="{place}" y="{HEIGHT - 6}" text-anchor="middle">{tick:g}</text>')
    for number, line in enumerate(lines):
        name = f"c{number % COLOURS}"
        if line.band is not None:
            parts.append(f'<path class="band {name}" d="{band_path(line, at)}"/>')
        for piece in pieces(line):
            points = " ".join(at(x, y) for x, y in piece)
            style = " dashed" if line.dashed else ""
            if len(piece) == 1:
                x, _, y = points.partition(",")
                parts.append(f'<circle class="{name}" cx="{x}" cy="{y}" r="2.5"/>')
            else:
                parts.append(f'<polyline class="{name}{style}" points="{points}"/>')
    return "".join(parts) + "</svg>"


def thinned(line: Line) -> Line:
    """At most POINTS points of a line, evenly spaced, the last among them."""
    count = len(line.x)
    if count <= POINTS:
        return line
    chosen = sorted({round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})
    band = None if line.band is None else [line.band[i] for i in chosen]
    return line._replace(x=[line.x[i] for i in chosen], y=[line.y[i] for i in chosen], band=band)


def edges(line: Line) -> list[float]:
    """All finite values that a line reaches, its band included."""
    band = line.band or [0.0] * len(line.y)
    reached = [y + sign * b for y, b in zip(line.y, band, strict=True) for sign in (-1, 1)]
    return [y for y in reached if math.isfinite(y)]


def pieces(line: Line) -> list[list[tuple[float, float]]]:
    """The points of a line, cut where a value is not finite."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]


def band_path(line: Line, at: object) -> str:
    """The outline of a line's band as an SVG path."""
    assert callable(at)
    triples = zip(line.x, line.y, line.band or (), strict=True)
    whole = [(x, y, b) for x, y, b in triples if math.isfinite(y) and math.isfinite(b)]
    above = [at(x, y + b) for x, y, b in whole]
    below = [at(x, y - b) for x, y, b in reversed(whole)]
    return "M" + "L".join([*above, *below]) + "Z" if whole else ""


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to six round values from at or below `low` to at or above `high`."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-12):
        room = abs(high) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def whole_ticks(low: float, high: float) -> list[int]:
    """Up to five whole numbers between `low` and `high`, both ends among them."""
    first, last = math.ceil(low), math.floor(high)
    count = min(5, last - first + 1)
    if count < 2:
        return [first]
    return sorted({round(first + i * (last - first) / (count - 1)) for i in range(count)})


def short(value: float) -> str:
    """A number for an axis, in at most six characters or so."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"
