"""The figures of many runs as tables, in Markdown and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.runs import Contender, Contest, Settings, Setup, finished, read_json, words
from utils.errors import UserError
from utils.evaluation.metrics import METRICS
from utils.files import whole_file, write_json
from utils.flags.recipes import with_recipe
from utils.logger import log
from utils.tables import Table, machine_line

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


def earlier_page(page: str, settings: Settings) -> dict[str, Any]:
    """With --keep the figures of the page that is there; else none.

    Raises UserError where they cannot be read, or where what all rows share was another then.
    """
    path = settings.docs / f"{page}.json"
    if not settings.keep or not path.exists():
        return {}
    earlier = read_json(path)
    if missing := {"rows", "lrs", "metrics", "lpips_pairs"} - earlier.keys():
        raise UserError(f"--keep: {path} is damaged: it has no {min(missing)}")
    images = earlier.get("images", settings.images)
    if images != settings.images:
        raise UserError(f"--keep: {path} is of other images: {images}, not {settings.images}")
    if earlier["lrs"] != list(settings.lrs):
        rates = [", ".join(map(str, lrs)) or "none" for lrs in (settings.lrs, earlier["lrs"])]
        raise UserError(f"--keep: --lrs {rates[0]} is not that of {path}, {rates[1]}")
    if "lpips" in earlier["metrics"] and earlier["lpips_pairs"] != settings.num_test:
        raise UserError(
            f"--keep: --num_test {settings.num_test} is not that of {path}, "
            f"{earlier['lpips_pairs']}"
        )
    return earlier


def with_kept(
    rows: Sequence[Row],
    contenders: Sequence[Contender],
    setup: Setup,
    settings: Settings,
    earlier: Mapping[str, Any],
) -> list[Row]:
    """The rows, and what an earlier page holds of the same flags: other contenders, other seeds.

    So a page can be made in parts, on several machines or days.
    """
    new = {row.name: row for row in rows}
    kept = {row["name"]: row for row in earlier.get("rows", ())}
    whole = []
    for contender in contenders:
        row, old = new.get(contender.name), kept.get(contender.name)
        if old is not None and same_flags(old, contender, row, setup, settings):
            row = merged(old, contender, row)
        elif old is not None:
            log.warning("%s: what the page has was trained with other flags", contender.name)
        if row is not None:
            whole.append(row)
    return whole


def same_flags(
    old: Mapping[str, Any],
    contender: Contender,
    row: Row | None,
    setup: Setup,
    settings: Settings,
) -> bool:
    """Whether a kept row was trained as its contender is now."""
    if row is not None and row.lr != old["lr"]:
        return False
    shared = {**setup.flags, "max_steps": settings.steps}
    flags = with_recipe({**shared, **contender.flags, "lr": old["lr"]})
    return bool(old["all_flags"] == json.loads(json.dumps(flags)))


def merged(old: Mapping[str, Any], contender: Contender, row: Row | None) -> Row:
    """The seeds of a kept row that are not in the row, and those of the row; in order."""
    figures: dict[int, dict[str, float]] = {}
    sources = [(old["seeds"], old["figures"])]
    if row is not None:
        sources.append((row.seeds, row.figures))
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
    """Mean validation PSNR by learning rate, over the seeds kept and those of the row."""
    found: dict[str, float] = dict(old["validation"])
    if row is None:
        return found
    if set(old["seeds"]) <= set(row.seeds):
        return {**found, **row.validation}
    kept, new = len(old["seeds"]), len(set(row.seeds) - set(old["seeds"]))
    for lr, value in row.validation.items():
        found[lr] = (kept * found.get(lr, value) + new * value) / (kept + new)
    return found


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
        if name == "lpips" and any(r["num_test"] != settings.num_test for r in done.values()):
            continue  # of other pairs
        if None not in values:
            figures[name] = [float(value) for value in values if value is not None]
    contender, scores = contest.contender, contest.scores()
    return Row(
        *(contender.name, contender.family, contender.flags),
        lr=contest.winners()[0].lr,
        seeds=list(done),
        figures=figures,
        validation={f"{lr:g}": statistics.mean(values) for lr, values in scores.items()},
        machines=sorted({machine_of(result["machine"]) for result in done.values()}),
    )


def machine_of(about: Mapping[str, Any]) -> str:
    """A machine, how many runs shared it, and the versions, in words."""
    return machine_line(about, f"{about['jobs']} at a time with {about['threads']} threads each")


def figures_table(title: str, rows: Sequence[Row]) -> Table:
    """Mean ± sample standard deviation over the seeds; figures that no row has are left out."""
    shown = [name for name in FIGURES if any(name in row.figures for row in rows)]
    table = Table(title, ["", *(FIGURES[name].title for name in shown), "lr", "seeds", "flags"])
    for row in rows:
        cells = [spread(row.figures.get(name, ()), FIGURES[name].digits) for name in shown]
        flags = f"`{' '.join(words(row.flags))}`" if row.flags else "none"
        table.rows.append([row.name, *cells, f"{row.lr:g}", ", ".join(map(str, row.seeds)), flags])
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
    summaries: Sequence[Table] = ()  # what follows from the rows

    def write(self) -> list[Path]:
        """Write <name>.md and <name>.json; returns the paths, those of the pictures too."""
        docs = self.settings.docs
        paths = [docs / f"{self.name}{suffix}" for suffix in (".md", ".json")]
        if not self.rows:
            log.warning("nothing was measured; %s stays as it is", paths[0])
            return []
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
            f"--metrics {' '.join(self.metrics)} --protocol clean` on all test images"
            f"{self.on_fewer()}.",
            "",
            *self.notes(),
            *(f"Machine: {line}.\n" for line in self.machines()),
        ]
        for file, text in self.pictures.items():
            lines += [f"![{text}]({file})", ""]
        tables = [
            *(table for table in self.summaries if table.rows),
            figures_table("Figures", self.rows),
        ]
        lines.append("\n\n".join(table.markdown() for table in tables))
        return "\n".join(lines) + "\n"

    def machines(self) -> list[str]:
        return sorted({line for row in self.rows for line in row.machines})

    @property
    def metrics(self) -> list[str]:
        """Those that some row has."""
        return [name for name in METRICS if any(name in row.figures for row in self.rows)]

    @property
    def seeds(self) -> list[int]:
        """Those asked for, and those that rows were kept of."""
        return sorted({*self.settings.seeds, *(seed for row in self.rows for seed in row.seeds)})

    @property
    def whole_command(self) -> str:
        """The command with what decides the figures."""
        settings = self.settings
        options = {
            "steps": settings.steps,
            "seeds": self.seeds,
            "lrs": settings.lrs or None,
            "num_test": settings.num_test,
            "only": [row.name for row in self.rows] if len(self.rows) < self.expected else None,
        }
        return " ".join([self.command, *words(options)])

    def on_fewer(self) -> str:
        number = self.settings.num_test
        return f" (LPIPS on the first {number:,})" if number and "lpips" in self.metrics else ""

    def notes(self) -> list[str]:
        """Seeds, learning rates, and what is not there."""
        settings = self.settings
        seeds = ", ".join(map(str, self.seeds))
        several = len(self.seeds) > 1
        notes = [
            f"{settings.steps:,} steps; seed{'s' if several else ''} {seeds}"
            + (": mean ± sample standard deviation. " if several else ". ")
        ]
        if any(set(row.seeds) != set(self.seeds) for row in self.rows):
            notes.append("Not every row has all of these seeds; the column says which. ")
        if len(settings.lrs) > 1:
            rates = ", ".join(f"{lr:g}" for lr in settings.lrs)
            notes.append(
                f"Where a row's flags do not name its learning rate, it is the one of {rates} with "
                "the best mean validation PSNR, of those that most seeds were trained with. "
            )
        lacking = [row.name for row in self.rows if "lpips" not in row.figures]
        if lacking:
            of = "" if len(lacking) == len(self.rows) else f" of {', '.join(lacking)}"
            notes.append(f"LPIPS{of} was not measured. ")
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
            "seeds": self.seeds,
            "lrs": settings.lrs,
            "metrics": self.metrics,
            "images": settings.images,
            "lpips_pairs": settings.num_test,
            "rows": [
                {**asdict(row), "all_flags": with_recipe({**shared, **row.flags, "lr": row.lr})}
                for row in self.rows
            ],
            "failures": self.failures,
        }
