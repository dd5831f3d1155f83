"""Charts drawn by matplotlib: as pictures, and as inline SVG in the colours of style.css."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 420, 260  # of a chart, in points
AREA = (54, 44, 350, 176)  # left, bottom, width and height of its axes
HEAD, LETTERS = 62, 68  # height of the text above a picture, and letters in a line of it
COLOURS = {  # in matplotlib's output → in the style sheet, which knows light and dark pages
    "#1f6f8b": "var(--first)",
    "#b5472f": "var(--second)",
    "#d9d8d2": "var(--rule)",
    "#5a5a55": "var(--soft)",
}
FIRST, SECOND, RULE, SOFT = COLOURS
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
    "path.simplify_threshold": 0.5,  # points: long curves stay small, and keep their spikes
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Chart:
    """A drawing on matplotlib's axes, with the words that screen readers read out."""

    name: str
    description: str
    x_label: str
    y_label: str  # stands above its axis
    draw: Callable[[Any], None]

    def svg(self) -> str:
        """Return the chart as an element of a page; text stays text."""
        import matplotlib

        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        # With a salt of its own the same chart gives the same page.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            drawn(self).savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        return inline(buffer.getvalue(), escape(self.name), escape(self.description))


def picture(*charts: Chart) -> Figure:
    """Return one figure of charts side by side, each under its name and description."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return drawn(*charts, head=HEAD)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def drawn(*charts: Chart, head: int = 0) -> Figure:
    from matplotlib.figure import Figure

    width, height = len(charts) * WIDTH, HEIGHT + head
    figure = Figure((width / 72, height / 72))
    for number, chart in enumerate(charts):
        edge, (left, bottom, wide, high) = number * WIDTH, AREA
        place = (edge + left) / width, bottom / height, wide / width, high / height
        axes = figure.add_axes(place)
        axes.grid(axis="y")
        axes.margins(x=0)
        axes.set_xlabel(chart.x_label)
        figure.text((edge + 4) / width, (HEIGHT - 14) / height, chart.y_label)
        if head:
            about = f"{chart.name}\n{textwrap.fill(chart.description, LETTERS)}"
            figure.text((edge + 4) / width, 1 - 6 / height, about, va="top", size=11)
        chart.draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(tick_label)
    return figure


def tick_label(value: float, _position: float) -> str:
    found = f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.3g}"
    return found.replace("-", "−")


def inline(svg: str, name: str, description: str) -> str:
    """Turn an SVG file of matplotlib into an element of the page; the words are HTML."""
    content = svg[svg.index("<defs>") :]
    content = re.sub(r"<style.*?</style>", "", content, count=1, flags=re.DOTALL)
    content = re.sub(r' id="[^"]+_\d+"| clip-path="[^"]+"', "", content)
    content = re.sub(r"font[-a-z]*: [^;\"]*;? ?", "", content)  # style.css has the fonts
    content = re.sub(r"(\.\d\d)\d{2,}(?=[ \"\n])", r"\1", content)
    content = re.sub(r"\n\s*", " ", content)
    for colour, variable in COLOURS.items():
        content = content.replace(colour, variable)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}: {description}">'
        f"<title>{name}</title><desc>{description}</desc>{content}"
    )
