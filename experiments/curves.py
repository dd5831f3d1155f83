"""Curves: quality against bits per pixel, and against steps and core-hours of training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.tables import COLUMNS, Row
from utils.charts import save_figure
from utils.evaluation.metrics import METRICS


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
    rows: Sequence[Row],
    styles: Mapping[str, Style],
    rate: str,
    quality: str,
    what: str,
    path: Path,
) -> bool:
    """Draw one curve per family in order of rate; return whether there was a point to draw.

    A family without a marker is a horizontal line.
    """
    families = {
        family: points
        for family in styles
        if (points := [row for row in rows if row.family == family and quality in row.figures])
    }
    if not any(rate in row.figures for points in families.values() for row in points):
        return False
    figure, axes = new_figure()
    for family, points in families.items():
        if styles[family].marker == "":
            level = statistics.mean(points[0].figures[quality])
            axes.axhline(level, **look(styles[family]))
        else:
            # A collapsed codebook needs 0 bits, which a logarithmic axis cannot show.
            shown = [point for point in points if (point.mean(rate) or 0) >= LEAST_RATE]
            if shown:
                draw_curve(axes, shown, styles[family], rate, quality)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=LEAST_RATE)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    metric = METRICS[quality]
    axes.set_title(f"{metric.label} against rate\n{what}")
    axes.set(xlabel=COLUMNS[rate].figure.title, ylabel=f"{metric.title}, {metric.direction}")
    add_legend(axes)
    save_figure(path, figure)
    return True


def draw_learning(
    curves: Mapping[str, Sequence[Row]], styles: Mapping[str, Style], what: str, path: Path
) -> None:
    """Draw PSNR against steps and against core-hours, a curve for each contender."""
    figure, axes = new_figure(2)
    scales = {"steps": "steps of training", "core_hours": "core-hours of training"}
    for number, (name, label) in enumerate(scales.items()):
        for contender, points in curves.items():
            known = [point for point in points if name in point.figures]
            style = replace(styles[points[0].family], label=contender)
            draw_curve(axes[number], known, style, name, "psnr")
        axes[number].set(xscale="log", xlabel=label)
        axes[number].xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes[number].xaxis.set_minor_formatter("")
    lengths = {s for points in curves.values() for row in points for s in row.figures["steps"]}
    axes[0].set_xticks(sorted(lengths))
    axes[0].set_ylabel(METRICS["psnr"].title)
    figure.suptitle(f"PSNR against training\n{what}")
    add_legend(axes[-1])
    save_figure(path, figure)


def new_figure(columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and its axes, of which there may be several side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 + 5 * columns, 5.6), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=True)


def add_legend(axes: Any) -> None:
    """Add a legend to the right of the axes, and a grid to all of the figure."""
    for each in axes.figure.axes:
        each.grid(alpha=0.25, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, handlelength=3
    )


def look(style: Style) -> dict[str, Any]:
    return {
        "color": style.colour,
        "linestyle": style.line,
        "linewidth": 2.4 if style.main else 1.3,
        "label": style.label,
        "zorder": 3 if style.main else 2,
    }


def draw_curve(axes: Any, points: Sequence[Row], style: Style, across: str, quality: str) -> None:
    """Draw points in order of a figure, joined, with the sample standard deviation over seeds."""
    placed = sorted(points, key=lambda point: statistics.mean(point.figures[across]))
    levels, values = ([row.figures[name] for row in placed] for name in (across, quality))
    x, y = ([statistics.mean(several) for several in figures] for figures in (levels, values))
    marks = {
        "marker": style.marker,
        "markersize": 7 if style.main else 5,
        "markerfacecolor": style.colour if style.main else "white",
    }
    axes.plot(x, y, **marks, **look(style))
    if any(len(row.seeds) > 1 for row in placed):
        spreads = ([deviation(several) for several in figures] for figures in (values, levels))
        axes.errorbar(x, y, *spreads, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
