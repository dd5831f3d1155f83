"""The figures of many runs as rows of a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.options import Settings
from experiments.runs import Contest, finished, trained
from utils.evaluation.metrics import METRICS
from utils.evaluation.schema import CODEBOOK, RATES, Figure
from utils.flags.command import words
from utils.tables import Table, machine_line

ENTROPY = "entropy_bits_per_pixel_by_slot"  # the rate that contenders are compared at


@dataclass(frozen=True)
class Column:
    """A figure of the tables: how it is shown, and its place in result.json."""

    figure: Figure
    part: str
    key: str
    scale: float = 1

    def read(self, result: Mapping[str, Any]) -> float | None:
        """The number, or None: an autoencoder without quantiser has no rate."""
        value = result[self.part].get(self.key)
        return None if value is None else self.scale * value


COLUMNS = {
    "entropy": Column(RATES[ENTROPY], "rate", ENTROPY),
    "coded": Column(RATES["coded_bits_per_pixel"], "rate", "coded_bits_per_pixel"),
    "nominal": Column(RATES["nominal_bits_per_pixel"], "rate", "nominal_bits_per_pixel"),
    **{name: Column(METRICS[name], "metrics", name) for name in ("psnr", "ssim", "l1", "lpips")},
    "usage": Column(CODEBOOK["usage_percent"], "codebook", "usage_percent"),
    "perplexity": Column(CODEBOOK["perplexity"], "codebook", "perplexity"),
    "step": Column(Figure("time per step", 1, "ms"), "training", "seconds_per_step", scale=1000),
    "core_hours": Column(Figure("core-hours", 2), "training", "core_hours"),
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
    validation: Mapping[str, float]  # PSNR of the first seed by normalisation and learning rate
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
    for name, column in COLUMNS.items():
        values = [column.read(result) for _, result in results]
        if name == "lpips" and any(r["num_test"] != settings.num_test for _, r in results):
            continue  # measured on other pairs
        if None not in values:
            figures[name] = [float(value) for value in values if value is not None]
    contender, winner = contest.contender, results[0][0]
    norm = {"latent_norm": winner.flags["latent_norm"]} if "latent_norm" in contest.choices else {}
    return Row(
        *(contender.name, contender.family, {**contender.flags, **norm}),
        lr=winner.lr,
        seeds=[run.flags["seed"] for run, _ in results],
        figures=figures,
        validation={
            " ".join(filter(None, [run.norm, f"{run.lr:g}"])): state["validation_psnr"]
            for run in contest.runs()
            if run.flags["seed"] == settings.seeds[0] and (state := trained(run))
        },
        machines=sorted({machine_of(result["machine"]) for _, result in results}),
    )


def machine_of(about: Mapping[str, Any]) -> str:
    """Describe a machine and how many runs shared it."""
    return machine_line(about, f"{about['jobs']} at a time with {about['threads']} threads each")


def merged(old: Mapping[str, Any], row: Row | None) -> Row:
    """Join a row of an earlier page with a new one, whose seeds replace those it has too."""
    figures: dict[int, dict[str, float]] = {}
    sources = [(old["seeds"], old["figures"]), *([(row.seeds, row.figures)] if row else [])]
    for seeds, values in sources:
        for place, seed in enumerate(seeds):
            figures[seed] = {name: several[place] for name, several in values.items()}
    seeds = sorted(figures)
    names = [name for name in COLUMNS if all(name in figures[seed] for seed in seeds)]
    return Row(
        *(old["name"], old["family"], old["flags"]),
        lr=old["lr"],
        seeds=seeds,
        figures={name: [figures[seed][name] for seed in seeds] for name in names},
        validation={**(row.validation if row else {}), **old["validation"]},
        machines=sorted({*old["machines"], *(row.machines if row else ())}),
    )


def figures_table(rows: Sequence[Row]) -> Table:
    """Mean ± sample standard deviation over the seeds; figures that no row has are left out."""
    shown = {
        name: column.figure
        for name, column in COLUMNS.items()
        if any(name in row.figures for row in rows)
    }
    titles = [figure.title for figure in shown.values()]
    table = Table("Figures", ["", *titles, "lr", "seeds", "flags"])
    for row in rows:
        cells = [spread(row.figures.get(name, ()), figure) for name, figure in shown.items()]
        flags = f"`{' '.join(words(row.flags))}`" if row.flags else "none"
        lr = f"{row.lr:g}" if row.seeds else ""  # a codec has none
        table.rows.append([row.name, *cells, lr, ", ".join(map(str, row.seeds)), flags])
    return table


def spread(values: Sequence[float], figure: Figure) -> str:
    """The mean, and ± the sample standard deviation of several values."""
    mean = figure.format(statistics.mean(values) if values else None)
    return mean if len(values) < 2 else f"{mean} ± {figure.format(statistics.stdev(values))}"
