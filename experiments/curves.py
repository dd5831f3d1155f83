"""Rate–distortion curves: quality against bits per pixel by the entropy of the indices."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.tables import ENTROPY, Row
from utils.charts import save_figure
from utils.evaluation.metrics import METRICS
from utils.evaluation.schema import RATES


@dataclass(frozen=True)
class Style:
    """Label, colour, marker and line of a family; main ones are drawn thicker."""

    label: str
    colour: str
    marker: str
    line: str = "-"
    main: bool = False


# Okabe and Ito's colours, distinct for any colour vision; marker and line distinguish the families
# without colour too.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#B8A900", "#0072B2", "#D55E00", "#CC79A7"),
)
LEAST_RATE = 0.1  # bits per pixel


def draw(
    rows: Sequence[Row], styles: Mapping[str, Style], quality: str, what: str, path: Path
) -> bool:
    """Draw one curve per family in order of rate; return whether there was anything to draw.

    A family without a rate is a horizontal line.
    """
    families = {
        family: points
        for family in styles
        if (points := [row for row in rows if row.family == family and quality in row.figures])
    }
    if not families:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = figure.subplots()
    for family, points in families.items():
        draw_family(axes, points, styles[family], quality)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=LEAST_RATE)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    metric = METRICS[quality]
    title = f"{metric.label} against rate\n{what}"
    axes.set(title=title, xlabel=RATES[ENTROPY].title, ylabel=f"{metric.title}, {metric.direction}")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, handlelength=3
    )
    save_figure(path, figure)
    return True


def draw_family(axes: Any, points: Sequence[Row], style: Style, quality: str) -> None:
    """Draw the points of a family, joined, with the sample standard deviation over seeds."""
    look = {
        "color": style.colour,
        "linestyle": style.line,
        "linewidth": 2.4 if style.main else 1.3,
        "label": style.label,
        "zorder": 3 if style.main else 2,
    }
    if style.marker == "":
        axes.axhline(statistics.mean(points[0].figures[quality]), **look)
        return
    # A collapsed codebook needs 0 bits, which a logarithmic axis cannot show.
    placed = sorted(
        (point for point in points if (point.mean("entropy") or 0) >= LEAST_RATE),
        key=lambda point: statistics.mean(point.figures["entropy"]),
    )
    rates, values = ([row.figures[name] for row in placed] for name in ("entropy", quality))
    x, y = ([statistics.mean(several) for several in figures] for figures in (rates, values))
    marks = {
        "marker": style.marker,
        "markersize": 7 if style.main else 5,
        "markerfacecolor": style.colour if style.main else "white",
    }
    axes.plot(x, y, **marks, **look)
    if any(len(row.seeds) > 1 for row in placed):
        spreads = ([deviation(several) for several in figures] for figures in (values, rates))
        axes.errorbar(x, y, *spreads, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
