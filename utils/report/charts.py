"""Charts as inline SVG, drawn by matplotlib: text stays text, colours are those of style.css."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

WIDTH, HEIGHT = 420, 260  # of a chart, in points
AREA = (54 / WIDTH, 44 / HEIGHT, 350 / WIDTH, 176 / HEIGHT)  # left, bottom, width, height
COLOURS = {  # in matplotlib's output → in the style sheet, which knows light and dark pages
    "#1f6f8b": "var(--first)",
    "#b5472f": "var(--second)",
    "#d9d8d2": "var(--rule)",
    "#5a5a55": "var(--soft)",
}
FIRST, SECOND, RULE, SOFT = COLOURS
MANY = 1000  # more points than these become pixels: as paths they would swell the page
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.edgecolor": SOFT,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": RULE,
    "xtick.color": SOFT,
    "xtick.labelcolor": "black",  # which is left out of the SVG: the style sheet decides
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}

Point = tuple[float, float]


def chart(
    name: str, description: str, x_label: str, y_label: str, draw: Callable[[Any], None]
) -> str:
    """Return the SVG of what draw puts on matplotlib's axes.

    Name and description are read out by screen readers. The label of y stands above its axis.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):  # the same run, the same page
        figure = Figure((WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes(AREA)
        axes.grid(axis="y")
        axes.margins(x=0)
        axes.set_xlabel(x_label)
        figure.text(4 / WIDTH, 1 - 14 / HEIGHT, y_label)
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(tick_label)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return inline(buffer.getvalue(), name, description)


def tick_label(value: float, _position: float) -> str:
    found = f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.3g}"
    return found.replace("-", "−")


def inline(svg: str, name: str, description: str) -> str:
    """Turn an SVG file of matplotlib into an element of the page."""
    content = svg[svg.index("<defs>") :]
    content = re.sub(r"<style.*?</style>", "", content, count=1, flags=re.DOTALL)
    content = re.sub(r' id="[^"]+_\d+"| clip-path="[^"]+"', "", content)
    content = re.sub(r"font[-a-z]*: [^;\"]*;? ?", "", content)  # style.css has the fonts
    content = re.sub(r"(\.\d\d)\d{2,}(?=[ \"\n])", r"\1", content)
    content = re.sub(r"\n\s*", " ", content)
    for colour, variable in COLOURS.items():
        content = content.replace(colour, variable)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}: '
        f'{escape(description)}"><title>{escape(name)}</title>'
        f"<desc>{escape(description)}</desc>{content}"
    )


def draw_lines(
    axes: Any, series: Mapping[str, Sequence[Point]], log: bool, low: float | None
) -> None:
    """Draw one or two lines; the second is dashed, with dots where it has few points.

    The y axis starts at low, where given, or below.
    """
    for (key, points), colour, line in zip(series.items(), (FIRST, SECOND), ("-", "--")):
        dotted = len(points) <= 30 and (colour == SECOND or len(points) == 1)
        marker = "." if dotted else ""
        axes.plot(*zip(*points), color=colour, ls=line, marker=marker, ms=9, label=key)
    if log:
        few_decades = axes.dataLim.y1 < 1000 * axes.dataLim.y0
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if few_decades else (1,))
        axes.minorticks_off()
    if low is not None:
        axes.set_ylim(min(low, axes.dataLim.y0), None)
    if len(series) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.07), ncols=2)


def draw_bars(
    axes: Any,
    values: Sequence[float] | np.ndarray,
    start: float,
    width: float,
    mark: tuple[float, str] | None,
) -> None:
    """Draw touching bars of one width, from start on; mark: a horizontal line's height and name."""
    edges = start + width * np.arange(len(values) + 1)
    axes.stairs(values, edges, fill=True, color=FIRST, alpha=0.8)
    if mark:
        height, name = mark
        axes.axhline(height, color=SECOND, ls="--")
        axes.text(edges[-1], height, f"{name}\n", ha="right", va="center")


def draw_scatter(axes: Any, dots: Mapping[float, np.ndarray], crosses: np.ndarray) -> None:
    """Draw dots (n, 2) by their diameter, and crosses (k, 2); both axes have one scale."""
    pixels = sum(map(len, dots.values())) + len(crosses) > MANY
    for diameter, places in dots.items():
        axes.plot(*places.T, "o", c=FIRST, ms=diameter, mew=0, alpha=0.7, rasterized=pixels)
    axes.plot(*crosses.T, "x", c=SECOND, ms=6, mew=1.4, rasterized=pixels)
    axes.set_aspect("equal", "datalim")


def draw_heat_map(axes: Any, values: np.ndarray, size: tuple[int, int]) -> None:
    """Draw values (rows, columns) over axes from 0 to size, the first row on top."""
    columns, rows = size
    extent = (0, columns, rows, 0)
    axes.imshow(values, "inferno", aspect="auto", interpolation="none", extent=extent)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
