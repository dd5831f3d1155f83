"""Charts as small inline SVG: text stays text, colours are those of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 404, 40, 216  # edges of the plotted area
SERIES = ("first", "second")  # classes of the style sheet

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Values from low to high, drawn between two places."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value is drawn; values outside are drawn at the edge."""
        low, high, value = (self.scale(v) for v in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    def scale(self, value: float) -> float:
        """The value, or its logarithm."""
        return math.log10(max(value, self.low)) if self.log else value

    def ticks(self) -> list[float]:
        """Round values, about five of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) < 4 else (1,)
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [value for value in found if self.low <= value <= self.high]
            return found[:: -(-len(found) // 7) or 1]
        step = round_step((self.high - self.low) / 6)
        return list(multiples(step, self.low, self.high))


def round_step(width: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below width."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * 0.999)


def multiples(step: float, low: float, high: float) -> Iterator[float]:
    for number in count(math.ceil(low / step - 1e-9)):
        if number * step > high + step * 1e-9:
            return
        yield number * step


def axes(
    points: Sequence[Point], *, log: bool = False, low: float | None = None
) -> tuple[Axis, Axis]:
    """Axes that hold the points; low, where given, is the least that y starts at."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    bottom, top = min(ys) if low is None else min(low, *ys), max(ys)
    if log:
        bottom = max(bottom, top * 1e-6)
    if top <= bottom:
        bottom, top = (bottom / 2, top * 2) if log else (bottom - 0.5, top + 0.5)
    left, right = min(xs), max(xs)
    return (
        Axis(left, right if right > left else left + 1, LEFT, RIGHT),
        Axis(bottom, top, BOTTOM, TOP, log),
    )


def label(value: float) -> str:
    found = f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.3g}"
    return found.replace("-", "−")


def drawing(name: str, description: str, parts: Sequence[str]) -> str:
    """An SVG that tells its name, and what it shows, to those who do not see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}: '
        f'{escape(description)}"><title>{escape(name)}</title>'
        f"<desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def words(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def frame(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    """Grid lines with their values, and what the axes mean; y's label stands above, upright."""
    parts = []
    for value in y.ticks():
        place = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{RIGHT}"/>')
        parts.append(words(LEFT - 6, place + 4, label(value), "end"))
    for value in x.ticks():
        place = x.at(value)
        parts.append(f'<path class="axis" d="M{place:.1f} {BOTTOM}v4"/>')
        parts.append(words(place, BOTTOM + 17, label(value), "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    parts.append(words((LEFT + RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
    parts.append(words(4, 14, y_label))
    return parts


def polyline(points: Sequence[Point], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in points)


def line_chart(
    name: str,
    description: str,
    series: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    low: float | None = None,
) -> str:
    """One or two lines; the second is dashed, and dotted where it has few points."""
    x, y = axes([point for points in series.values() for point in points], log=log, low=low)
    parts = frame(x, y, x_label, y_label)
    place = float(RIGHT)
    for (key, points), style in reversed(list(zip(series.items(), SERIES))):
        parts.append(f'<path class="line {style}" d="{polyline(points, x, y)}"/>')
        if len(points) <= 30 and (style == "second" or len(points) == 1):
            dots = "".join(f"M{x.at(a):.1f} {y.at(b):.1f}h0" for a, b in points)
            parts.append(f'<path class="dots {style}" stroke-width="6" d="{dots}"/>')
        if len(series) > 1:  # the legend, from right to left
            place -= 6.6 * len(key)
            parts.append(words(place, 14, key))
            parts.append(f'<path class="line {style}" d="M{place - 30:.1f} 10h24"/>')
            place -= 46
    return drawing(name, description, parts)


def step_chart(
    name: str,
    description: str,
    values: Sequence[float],
    x_label: str,
    y_label: str,
    *,
    width: float = 1,
    start: float = 0,
    mark: tuple[float, str] | None = None,
) -> str:
    """Touching bars, each that wide, from start on; mark is a horizontal line and its name."""
    edges = [start + width * number for number in range(len(values) + 1)]
    top = max(*values, mark[0] if mark else 0, 1e-12)
    x, y = Axis(edges[0], edges[-1], LEFT, RIGHT), Axis(0, top, BOTTOM, TOP)
    outline = [f"M{LEFT} {BOTTOM}"]
    for left, right, value in zip(edges, edges[1:], values):
        outline.append(f"L{x.at(left):.1f} {y.at(value):.1f}L{x.at(right):.1f} {y.at(value):.1f}")
    parts = frame(x, y, x_label, y_label)
    parts.append(f'<path class="area" d="{"".join(outline)}L{RIGHT} {BOTTOM}Z"/>')
    if mark:
        height = y.at(mark[0])
        parts.append(f'<path class="line second" d="M{LEFT} {height:.1f}H{RIGHT}"/>')
        parts.append(words(RIGHT, height - 5, mark[1], "end"))
    return drawing(name, description, parts)


def scatter_chart(
    name: str,
    description: str,
    dots: Mapping[float, Sequence[Point]],
    crosses: Sequence[Point],
    x_label: str,
    y_label: str,
) -> str:
    """Dots by their diameter, and crosses; both axes have one scale."""
    points = [*crosses, *(point for group in dots.values() for point in group)]
    x, y = axes(points)
    scale = max((x.high - x.low) / (RIGHT - LEFT), (y.high - y.low) / (BOTTOM - TOP)) * 1.05
    x, y = (
        Axis(middle - scale * length / 2, middle + scale * length / 2, *ends)
        for middle, length, ends in (
            ((x.low + x.high) / 2, RIGHT - LEFT, (LEFT, RIGHT)),
            ((y.low + y.high) / 2, BOTTOM - TOP, (BOTTOM, TOP)),
        )
    )
    parts = frame(x, y, x_label, y_label)
    for diameter, group in dots.items():
        places = "".join(f"M{x.at(a):.1f} {y.at(b):.1f}h0" for a, b in group)
        parts.append(f'<path class="dots first" stroke-width="{diameter}" d="{places}"/>')
    marks = "".join(f"M{x.at(a) - 3:.1f} {y.at(b) - 3:.1f}l6 6m-6 0l6-6" for a, b in crosses)
    parts.append(f'<path class="crosses" d="{marks}"/>' if marks else "")
    return drawing(name, description, parts)


def picture_chart(
    name: str, description: str, picture: str, size: tuple[int, int], x_label: str, y_label: str
) -> str:
    """A picture given as a URI, stretched over axes from 0 to size, the first row on top."""
    x, y = Axis(0, size[0], LEFT, RIGHT), Axis(0, size[1], TOP, BOTTOM)
    parts = [
        f'<image class="pixels" href="{picture}" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" '
        f'height="{BOTTOM - TOP}" preserveAspectRatio="none"/>'
    ]
    for value in (value for value in y.ticks() if value == int(value)):
        parts.append(words(LEFT - 6, y.at(value) + 4, label(value), "end"))
    for value in (value for value in x.ticks() if value == int(value)):
        parts.append(words(x.at(value), BOTTOM + 17, label(value), "middle"))
    parts += [words((LEFT + RIGHT) / 2, HEIGHT - 8, x_label, "middle"), words(4, 14, y_label)]
    return drawing(name, description, parts)
