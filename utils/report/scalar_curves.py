"""Section on training: its curves, each with a guide to reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from utils.charts import FIRST, SECOND, Chart
from utils.report.files import Found, Point
from utils.report.markup import Missing, details, figure, shown, spread, table, text

MAX_ROWS = 12  # of a curve's table
CURVES = {  # scalar → (title, unit, start of the axis, how to read it)
    "loss": (
        "Loss",
        "loss",
        None,
        "It should fall and level off. <b>Bad:</b> spikes, a rise, or no bend at all: the run was "
        "too short, or the learning rate is wrong.",
    ),
    "psnr": (
        "PSNR",
        "dB",
        None,
        "Training and validation should rise together. <b>Bad:</b> validation that falls while "
        "training rises: the model overfits.",
    ),
    "usage_percent": (
        "Codebook usage",
        "% of codevectors",
        0,
        "It should be near 100 % and stay there. <b>Bad:</b> a fall: codevectors die and nothing "
        "brings them back.",
    ),
    "bits_per_pixel": (
        "Likelihood",
        "bits per pixel",
        0,
        "The rate at which an ideal coder with this prior codes the images. Training and "
        "validation should fall together. <b>Bad:</b> validation that rises while training falls: "
        "the prior learns the training images by heart.",
    ),
    "masked_bits_per_pixel": (
        "Likelihood of masked codes",
        "bits per pixel",
        0,
        "No rate, but comparable between runs. Training and validation should fall together. "
        "<b>Bad:</b> validation that rises while training falls: the prior learns the training "
        "images by heart.",
    ),
    "denoising_loss": (
        "Denoising loss",
        "mean squared error of the noise",
        0,
        "It should fall fast at first, then slowly for very long, while samples still improve. "
        "<b>Bad:</b> validation that rises while training falls: the prior learns the training "
        "images by heart.",
    ),
    "perplexity": (
        "Perplexity",
        "codevectors",
        0,
        "The number of equally used codevectors with the same entropy; at most K. <b>Bad:</b> far "
        "below K, or a collapse.",
    ),
}


def training_curves(found: Found) -> str:
    place = f" It was looked for in {text(found.logs)}." if found.logs else ""
    found.need("TensorBoard's folder", f"main.py writes it.{place}")
    return curve_charts(found.curves)


def curve_charts(curves: Mapping[str, Sequence[Point]]) -> str:
    """Return the charts of the known scalars. Raises Missing if there are none."""
    charts = []
    for scalar, (title, unit, low, caption) in CURVES.items():
        series = {
            group: curves[f"{group}/{scalar}"]
            for group in ("train", "validation")
            if curves.get(f"{group}/{scalar}")
        }
        if not series:
            continue
        steps, values = zip(*chain.from_iterable(series.values()))
        log = scalar == "loss" and min(values) > 0 and max(values) > 20 * min(values)
        ends = "; ".join(
            f"{group} from {shown(points[0][1])} to {shown(points[-1][1])}"
            for group, points in series.items()
        )
        described = f"{ends}, steps {min(steps):,} to {max(steps):,}"
        y_label = f"{unit}, logarithmic" if log else unit
        drawing = partial(draw_lines, series=series, log=log, low=low)
        chart = Chart(title, described, "step", y_label, drawing).svg()
        charts.append(
            f"<div><h3>{title}</h3>"
            + figure(chart, caption)
            + details(f"{title} as a table", curve_table(title, series))
            + "</div>"
        )
    if not charts:
        raise Missing("TensorBoard's files hold none of the known curves.")
    return f'<div class="columns">{"".join(charts)}</div>'


def draw_lines(
    axes: Any, series: Mapping[str, Sequence[Point]], log: bool, low: float | None
) -> None:
    """Draw one or two lines, the second dashed; the y axis starts at low, if given, or below."""
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


def curve_table(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Return a few values of each curve; curves may have values at different steps."""
    few = [spread(points, MAX_ROWS) for points in series.values()]
    steps = sorted({step for points in few for step, _ in points})
    columns = [dict(points) for points in few]
    rows = [
        (f"{step:,}", *(shown(column[step]) if step in column else "" for column in columns))
        for step in steps
    ]
    return table(title, ("step", *series), {"": rows})
