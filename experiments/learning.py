"""Learning curves: PSNR of the test images against steps and core-hours of training.

Each point is a run of its own, trained from the start. A checkpoint in the middle of a longer run
would not do: the learning rate falls to 0 at the end of a run, which is worth as much as many
steps. The validation images choose the checkpoint of each run; the test images are measured once.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from experiments.curves import Style, draw_learning
from experiments.page import Experiment
from experiments.runs import read_json
from experiments.tables import COLUMNS, Row, spread
from utils.tables import Table, write_page

ABOUT = """\
Each point is a run of its own, trained from the start, whose learning rate ends at its own last
step. PSNR is of the test images, in brackets core-hours of the training steps alone. Bits per pixel
are the entropy of the indices after the longest run."""


def write_learning(experiments: Sequence[Experiment], styles: Mapping[str, Style]) -> None:
    """Write table and picture of the pages of several lengths, as far as they exist."""
    docs = experiments[0].settings.docs
    curves: dict[str, list[Row]] = {}
    for experiment in experiments:
        steps = experiment.settings.max_steps
        for row in read_json(docs / f"{experiment.page}.json").get("rows", ()):
            figures = {**row["figures"], "steps": [steps] * len(row["seeds"])}
            known = {name: row[name] for name in Row.__dataclass_fields__}
            curves.setdefault(row["name"], []).append(Row(**{**known, "figures": figures}))
    if not curves:
        return
    lengths = [experiment.settings.max_steps for experiment in experiments]
    table = Table("PSNR in dB", ["", *(f"{n:,} steps" for n in lengths), "bits per pixel", "seeds"])
    for name, points in curves.items():
        found = {int(point.figures["steps"][0]): cell(point) for point in points}
        seeds = sorted({seed for point in points for seed in point.seeds})
        rate = spread(points[-1].figures.get("entropy", ()), COLUMNS["entropy"].figure)
        cells = [found.get(steps, "–") for steps in lengths]
        table.rows.append([name, *cells, rate, ", ".join(map(str, seeds))])
    label, title = experiments[0].settings.output.name, experiments[0].settings.setup.title
    page = docs / f"compare-{label}-learning.md"
    draw_learning(curves, styles, title, page.with_suffix(".png"))
    picture = f"![PSNR against steps and core-hours]({page.stem}.png)"
    pages = ", ".join(f"[{e.settings.max_steps:,}]({e.page}.md)" for e in experiments)
    write_page(page, f"Learning curves: {title}", ABOUT, f"By steps: {pages}.", picture, table)


def cell(point: Row) -> str:
    """PSNR, and core-hours where they are known."""
    psnr = spread(point.figures["psnr"], COLUMNS["psnr"].figure)
    hours = point.figures.get("core_hours")
    return f"{psnr} ({statistics.mean(hours):.2f})" if hours else psnr
