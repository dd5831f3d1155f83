"""The figures of many runs as rows of a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.children import words
from experiments.runs import Contender, Contest, Settings, finished
from utils.evaluation.metrics import METRICS
from utils.tables import Table, machine_line

NONE = "–"


@dataclass(frozen=True)
class Figure:
    """One number of a result: its heading, its digits, and its place in result.json."""

    title: str
    digits: int
    part: str
    key: str
    scale: float = 1

    def read(self, result: Mapping[str, Any]) -> float | None:
        """The number, or None: an autoencoder without quantiser has no rate."""
        value = result[self.part].get(self.key)
        return None if value is None else self.scale * value


FIGURES = {
    "entropy": Figure("bits per pixel, entropy", 3, "rate", "entropy_bits_per_pixel_by_slot"),
    "nominal": Figure("nominal", 3, "rate", "nominal_bits_per_pixel"),
    "psnr": Figure(METRICS["psnr"].title, 2, "metrics", "psnr"),
    "ssim": Figure(METRICS["ssim"].title, 4, "metrics", "ssim"),
    "l1": Figure(METRICS["l1"].title, 4, "metrics", "l1"),
    "lpips": Figure(METRICS["lpips"].title, 4, "metrics", "lpips"),
    "usage": Figure("usage, %", 1, "codebook", "usage_percent"),
    "perplexity": Figure("perplexity", 1, "codebook", "perplexity"),
    "step": Figure("ms per step", 1, "training", "seconds_per_step", 1000),
}


@dataclass(frozen=True)
class Row:
    """Measured figures of one contender, by name, one for each seed."""

    name: str
    family: str
    flags: Mapping[str, Any]
    lr: float
    seeds: Sequence[int]
    figures: Mapping[str, Sequence[float]]
    validation: Mapping[str, float]  # mean validation PSNR by candidate learning rate
    machines: Sequence[str]  # on which it was trained and measured

    def mean(self, figure: str) -> float | None:
        """The mean over seeds; None if it was not measured."""
        values = self.figures.get(figure)
        return statistics.mean(values) if values else None


def collect(found: Sequence[Contest], settings: Settings) -> list[Row]:
    """A row for each contender that has a finished run, in their order."""
    return [row for contest in found if (row := row_of(contest, settings)) is not None]


def row_of(contest: Contest, settings: Settings) -> Row | None:
    winners = contest.winners()
    results = [(run, result) for run in winners if (result := finished(run, settings)) is not None]
    if not results:
        return None
    figures = {}
    for name, figure in FIGURES.items():
        values = [figure.read(result) for _, result in results]
        if name == "lpips" and any(r["num_test"] != settings.num_test for _, r in results):
            continue  # measured on other pairs
        if None not in values:
            figures[name] = [float(value) for value in values if value is not None]
    contender, scores = contest.contender, contest.scores()
    return Row(
        *(contender.name, contender.family, contender.flags),
        lr=winners[0].lr,
        seeds=[run.flags["seed"] for run, _ in results],
        figures=figures,
        validation={f"{lr:g}": statistics.mean(values) for lr, values in scores.items()},
        machines=sorted({machine_of(result["machine"]) for _, result in results}),
    )


def machine_of(about: Mapping[str, Any]) -> str:
    """Describe a machine and how many runs shared it."""
    return machine_line(about, f"{about['jobs']} at a time with {about['threads']} threads each")


def merged(old: Mapping[str, Any], contender: Contender, row: Row | None) -> Row:
    """Join a row of an earlier page with a new one, whose seeds replace those it has too."""
    figures: dict[int, dict[str, float]] = {}
    sources = [(old["seeds"], old["figures"]), *([(row.seeds, row.figures)] if row else [])]
    for seeds, values in sources:
        for place, seed in enumerate(seeds):
            figures[seed] = {name: several[place] for name, several in values.items()}
    seeds = sorted(figures)
    names = [name for name in FIGURES if all(name in figures[seed] for seed in seeds)]
    return Row(
        *(contender.name, contender.family, contender.flags),
        lr=old["lr"],
        seeds=seeds,
        figures={name: [figures[seed][name] for seed in seeds] for name in names},
        validation=merged_validation(old, row),
        machines=sorted({*old["machines"], *(row.machines if row else ())}),
    )


def merged_validation(old: Mapping[str, Any], row: Row | None) -> dict[str, float]:
    """Mean validation PSNR by learning rate, over the seeds of the earlier row and the new one."""
    found: dict[str, float] = dict(old["validation"])
    if row is None:
        return found
    if set(old["seeds"]) <= set(row.seeds):
        return {**found, **row.validation}
    kept, new = len(old["seeds"]), len(set(row.seeds) - set(old["seeds"]))
    for lr, value in row.validation.items():
        found[lr] = (kept * found.get(lr, value) + new * value) / (kept + new)
    return found


def figures_table(rows: Sequence[Row]) -> Table:
    """Mean ± sample standard deviation over the seeds; figures that no row has are left out."""
    shown = [name for name in FIGURES if any(name in row.figures for row in rows)]
    titles = [FIGURES[name].title for name in shown]
    table = Table("Figures", ["", *titles, "lr", "seeds", "flags"])
    for row in rows:
        cells = [spread(row.figures.get(name, ()), FIGURES[name].digits) for name in shown]
        flags = f"`{' '.join(words(row.flags))}`" if row.flags else "none"
        table.rows.append([row.name, *cells, f"{row.lr:g}", ", ".join(map(str, row.seeds)), flags])
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and ± the sample standard deviation of several values."""
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
