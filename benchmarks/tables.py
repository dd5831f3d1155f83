"""The figures of many runs as tables, in Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Table
from benchmarks.runs import Contest, Settings, Setup, finished, words
from utils.files import whole_file, write_json
from utils.metrics import METRICS
from utils.recipes import with_recipe

NONE = "–"


@dataclass(frozen=True)
class Row:
    """What was measured of one contender: figures by name, one for each seed."""

    name: str
    family: str
    flags: Mapping[str, Any]
    lr: float
    seeds: Sequence[int]
    figures: Mapping[str, Sequence[float]]
    validation: Mapping[str, float]  # mean validation PSNR by candidate learning rate
    machines: Sequence[str]  # on which it was trained and measured

    def mean(self, figure: str) -> float | None:
        """The mean over seeds; None where it was not measured."""
        values = self.figures.get(figure)
        return statistics.mean(values) if values else None


@dataclass(frozen=True)
class Figure:
    """One number of a result: its heading, its digits, and where it stands."""

    title: str
    digits: int
    read: Callable[[Mapping[str, Any]], float | None]


def metric(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: result["metrics"].get(name)


def rate(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """A rate; an autoencoder without quantiser has none."""
    return lambda result: result["rate"].get(name)


def codebook(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: result["codebook"].get(name)


FIGURES = {
    "entropy": Figure("bits a pixel, entropy", 3, rate("entropy_bits_per_pixel_by_slot")),
    "nominal": Figure("nominal", 3, rate("nominal_bits_per_pixel")),
    "psnr": Figure(METRICS["psnr"].label, 2, metric("psnr")),
    "ssim": Figure(METRICS["ssim"].label, 4, metric("ssim")),
    "l1": Figure(METRICS["l1"].label, 4, metric("l1")),
    "lpips": Figure(METRICS["lpips"].label, 4, metric("lpips")),
    "usage": Figure("usage, %", 1, codebook("usage_percent")),
    "perplexity": Figure("perplexity", 1, codebook("perplexity")),
    "step": Figure("ms a step", 1, lambda result: 1000 * result["training"]["seconds_per_step"]),
}


def collect(found: Sequence[Contest], settings: Settings) -> list[Row]:
    """A row for each contender that has a finished run, in their order."""
    return [row for contest in found if (row := row_of(contest, settings)) is not None]


def row_of(contest: Contest, settings: Settings) -> Row | None:
    done = {
        run.seed: result
        for run in contest.winners()
        if (result := finished(run, settings)) is not None
    }
    if not done:
        return None
    figures = {}
    for name, figure in FIGURES.items():
        values = [figure.read(result) for result in done.values()]
        if None not in values:
            figures[name] = [float(value) for value in values if value is not None]
    contender, scores = contest.contender, contest.scores()
    return Row(
        *(contender.name, contender.family, contender.flags),
        lr=contest.winners()[0].lr,
        seeds=list(done),
        figures=figures,
        validation={f"{lr:g}": statistics.mean(values) for lr, values in scores.items()},
        machines=sorted({machine_line(result["machine"]) for result in done.values()}),
    )


def machine_line(about: Mapping[str, Any]) -> str:
    """A machine, how many runs shared it, and the versions, in words."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['processor']}, {about['cores']} cores, {about['device']}, "
        f"{about['jobs']} at a time with {about['threads']} threads each, "
        f"Python {about['python']}; {versions}"
    )


def figures_table(title: str, rows: Sequence[Row]) -> Table:
    """Mean ± sample standard deviation over the seeds; figures that no row has are left out."""
    shown = [name for name in FIGURES if any(name in row.figures for row in rows)]
    table = Table(title, ["", *(FIGURES[name].title for name in shown), "lr", "seeds", "flags"])
    for row in rows:
        cells = [spread(row.figures.get(name, ()), FIGURES[name].digits) for name in shown]
        flags = f"`{' '.join(words(row.flags))}`" if row.flags else "none"
        table.rows.append([row.name, *cells, f"{row.lr:g}", f"{len(row.seeds)}", flags])
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and ± the sample standard deviation of several."""
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


@dataclass(frozen=True)
class Document:
    """A page of tables and pictures and the same figures as JSON."""

    name: str  # of the files, without suffix
    title: str
    about: str  # what was done and how to read it
    command: str  # that makes it
    setup: Setup
    settings: Settings
    rows: Sequence[Row]
    expected: int  # contenders that there are
    failures: Sequence[str] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)  # file name → what it shows

    def write(self) -> list[Path]:
        """Write <name>.md and <name>.json; returns the paths, those of the pictures too."""
        docs = self.settings.docs
        paths = [docs / f"{self.name}{suffix}" for suffix in (".md", ".json")]
        with whole_file(paths[0]) as temporary:
            temporary.write_text(self.markdown())
        write_json(paths[1], self.content())
        return [*paths, *(docs / file for file in self.pictures)]

    def markdown(self) -> str:
        settings = self.settings
        shared = {**self.setup.flags, "max_steps": settings.steps}
        lines = [
            f"# {self.title}",
            "",
            self.about,
            "",
            f"Made by `{self.whole_command}`. Each row is `python main.py "
            f"{' '.join(words(shared))} --lr LR --seed SEED` with the flags of its last "
            "column, then `test.py`, then `evaluation.py "
            f"--metrics {' '.join(settings.metrics)} --protocol clean` on all test images"
            f"{self.on_fewer()}.",
            "",
            *self.notes(),
            *(f"Machine: {line}.\n" for line in self.machines()),
        ]
        for file, text in self.pictures.items():
            lines += [f"![{text}]({file})", ""]
        lines.append(figures_table("Figures", self.rows).markdown().rstrip("\n"))
        return "\n".join(lines) + "\n"

    def machines(self) -> list[str]:
        return sorted({line for row in self.rows for line in row.machines})

    @property
    def whole_command(self) -> str:
        """The command with what decides the figures."""
        settings = self.settings
        options = {
            "steps": settings.steps,
            "seeds": settings.seeds,
            "lrs": settings.lrs or None,
            "num_test": settings.num_test,
        }
        return " ".join([self.command, *words(options)])

    def on_fewer(self) -> str:
        number = self.settings.num_test
        return (
            f" (LPIPS on the first {number:,})"
            if number and "lpips" in self.settings.metrics
            else ""
        )

    def notes(self) -> list[str]:
        """Seeds, learning rates, and what is not there."""
        settings = self.settings
        seeds = ", ".join(map(str, settings.seeds))
        several = len(settings.seeds) > 1
        notes = [
            f"{settings.steps:,} steps; seed{'s' if several else ''} {seeds}"
            + (": mean ± sample standard deviation. " if several else ". ")
        ]
        if len(settings.lrs) > 1:
            rates = ", ".join(f"{lr:g}" for lr in settings.lrs)
            notes.append(f"The learning rate is that of {rates} with the best validation PSNR. ")
        if "lpips" not in settings.metrics:
            notes.append("LPIPS is left out: the weights of its network were missing. ")
        if len(self.rows) < self.expected:
            notes.append(f"{self.expected - len(self.rows)} of {self.expected} are not there. ")
        if self.failures:
            notes.append(f"Failed: {', '.join(line.split(':')[0] for line in self.failures)}. ")
        return ["".join(notes).rstrip(), ""]

    def content(self) -> dict[str, Any]:
        """The figures of each seed, and everything needed to get them again."""
        settings = self.settings
        shared = {**self.setup.flags, "max_steps": settings.steps}
        return {
            "command": self.whole_command,
            "steps": settings.steps,
            "seeds": settings.seeds,
            "lrs": settings.lrs,
            "metrics": settings.metrics,
            "lpips_pairs": settings.num_test,
            "rows": [
                {**asdict(row), "all_flags": with_recipe({**shared, **row.flags, "lr": row.lr})}
                for row in self.rows
            ],
            "failures": self.failures,
        }
