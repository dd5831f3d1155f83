"""Run an experiment and write its page: tables and pictures in Markdown, all figures as JSON.

With --keep a page is made in parts, on several machines or days: rows and seeds of the existing
page are kept if they were trained with the same flags.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from experiments.children import Children
from experiments.margins import close_ones
from experiments.options import Contender, Settings, check_contenders
from experiments.runs import Contest, contests, read_json, run_all
from experiments.tables import Row, collect, figures_table, merged
from utils.errors import UserError
from utils.evaluation.metrics import METRICS
from utils.files import write_json
from utils.flags.arguments import with_recipe
from utils.flags.command import words
from utils.logger import log
from utils.tables import Table, write_page

# Pictures (file name → caption) and tables that are made of the rows.
Extras: TypeAlias = tuple[Mapping[str, str], Sequence[Table]]


@dataclass(frozen=True)
class Experiment:
    """Contenders to compare under the same settings, and the page that shows them."""

    page: str  # name of its files, without suffix
    title: str
    about: str  # what was done and how to read it
    command: str
    settings: Settings
    contenders: Sequence[Contender]
    codecs: Sequence[Row] = ()  # image formats, measured on the same images

    def run(
        self,
        selected: Sequence[Contender],
        children: Children,
        extras: Callable[[list[Row]], Extras] = lambda _: ({}, ()),
    ) -> list[str]:
        """Train and measure those selected, write the page and return the failures."""
        settings, earlier = self.settings, self.earlier()
        check_contenders(selected, settings)
        failures = run_all(self.planned(selected, first=True), settings, children)
        if settings.within is not None:
            further = [c for c in self.planned(selected) if c.settings is settings]
            failures += run_all(further, settings, children)
        rows = self.with_kept(collect(contests(self.contenders, settings), settings), earlier)
        codecs = {row["name"]: Row(**row) for row in earlier.get("codecs", ())}
        codecs |= {row.name: row for row in self.codecs}
        pictures, tables = extras([*rows, *codecs.values()])
        page = Page(self, rows, failures, pictures, tables, [*codecs.values()])
        sys.stdout.write("".join(f"{path}\n" for path in page.write()))
        return failures

    def planned(self, selected: Sequence[Contender], *, first: bool = False) -> list[Contest]:
        """The contests to hold: with --within, of the first seed alone where none is close.

        If first, all are of the first seed: it tells which are close.
        """
        settings = self.settings
        if settings.within is None:
            return contests(selected, settings)
        single = replace(settings, seeds=settings.seeds[:1])
        rows = [] if first else collect(contests(self.contenders, single), single)
        close = close_ones(rows, settings.within)
        return [Contest(c, settings if c.name in close else single) for c in selected]

    def earlier(self) -> dict[str, Any]:
        """The JSON of the existing page with --keep, else nothing.

        Raises UserError if it cannot be read, or if it shows other images or learning rates.
        """
        settings = self.settings
        path = settings.docs / f"{self.page}.json"
        if not settings.keep or not path.exists():
            return {}
        earlier = read_json(path)
        if missing := {"rows", "lrs", "metrics", "lpips_pairs"} - earlier.keys():
            raise UserError(f"--keep: {path} is damaged: it has no {min(missing)}")
        images = earlier.get("images", settings.images)
        if images != settings.images:
            raise UserError(f"--keep: {path} is of other images: {images}, not {settings.images}")
        for name, now in (("lrs", settings.lrs), ("latent_norms", settings.latent_norms)):
            if earlier.get(name, []) != list(now):
                new, old = (", ".join(map(str, x)) or "none" for x in (now, earlier.get(name, ())))
                raise UserError(f"--keep: --{name} {new} is not that of {path}, {old}")
        pairs = earlier["lpips_pairs"]
        if "lpips" in earlier["metrics"] and pairs != settings.num_test:
            raise UserError(
                f"--keep: --num_test {settings.num_test} is not that of {path}, {pairs}"
            )
        return earlier

    def with_kept(self, rows: Sequence[Row], earlier: Mapping[str, Any]) -> list[Row]:
        """The rows, joined with those of the earlier page that have the same flags."""
        new = {row.name: row for row in rows}
        kept = {row["name"]: row for row in earlier.get("rows", ())}
        whole = []
        for contender in self.contenders:
            row, old = new.get(contender.name), kept.get(contender.name)
            if old is not None and self.same_flags(old, contender, row):
                row = merged(old, row)
            elif old is not None:
                log.warning("%s: the row of the page was trained with other flags", contender.name)
            if row is not None:
                whole.append(row)
        return whole

    def same_flags(self, old: Mapping[str, Any], contender: Contender, row: Row | None) -> bool:
        """Return whether an earlier row was trained as its contender is now."""
        if row is not None and row.lr != old["lr"]:
            return False
        norm = {k: v for k, v in old["flags"].items() if k == "latent_norm"}
        own = {**norm, **contender.flags} if self.settings.latent_norms else contender.flags
        flags = self.all_flags(own, old["lr"])
        return bool(old["all_flags"] == json.loads(json.dumps(flags)))

    def all_flags(self, flags: Mapping[str, Any], lr: float) -> dict[str, Any]:
        return with_recipe({**self.settings.flags, **flags, "lr": lr})


@dataclass(frozen=True)
class Page:
    """The rows of an experiment as Markdown and JSON."""

    experiment: Experiment
    rows: Sequence[Row]
    failures: Sequence[str]
    pictures: Mapping[str, str]  # file name → caption
    tables: Sequence[Table]  # before that of all figures
    codecs: Sequence[Row] = ()

    def write(self) -> list[Path]:
        """Write <name>.md and <name>.json; return the paths, with those of the pictures."""
        docs, name = self.experiment.settings.docs, self.experiment.page
        page, data = docs / f"{name}.md", docs / f"{name}.json"
        if not self.rows and not self.codecs:
            log.warning("nothing was measured; %s stays as it is", page)
            return []
        write_page(
            *(page, self.experiment.title, self.experiment.about, self.made(), self.notes()),
            *(
                f"Machine: {line}."
                for line in sorted({m for row in self.rows for m in row.machines})
            ),
            *(f"![{caption}]({file})" for file, caption in self.pictures.items()),
            *(
                table
                for table in (*self.tables, figures_table([*self.rows, *self.codecs]))
                if table.rows
            ),
        )
        write_json(data, self.content())
        return [page, data, *(docs / file for file in self.pictures)]

    @property
    def metrics(self) -> list[str]:
        """The metrics that some row has."""
        return [name for name in METRICS if any(name in row.figures for row in self.rows)]

    @property
    def seeds(self) -> list[int]:
        """The seeds asked for and those of kept rows."""
        seeds = self.experiment.settings.seeds
        return sorted({*seeds, *(seed for row in self.rows for seed in row.seeds)})

    @property
    def lacking(self) -> int:
        return len(self.experiment.contenders) - len(self.rows)

    @property
    def command(self) -> str:
        """The command with all options that decide the figures."""
        settings = self.experiment.settings
        options = {
            "steps": settings.max_steps,
            "seeds": self.seeds,
            "within": settings.within,
            "latent_norms": settings.latent_norms or None,
            "lrs": settings.lrs or None,
            "num_test": settings.num_test,
            "only": [row.name for row in self.rows] if self.lacking else None,
            "codecs": [*dict.fromkeys(row.family.removesuffix("-bare") for row in self.codecs)]
            or None,
            **settings.data,
        }
        return f"{self.experiment.command} {shlex.join(words(options))}"

    def made(self) -> str:
        """The commands that make the figures."""
        settings = self.experiment.settings
        fewer = settings.num_test and "lpips" in self.metrics
        flags = {**settings.flags, "data_folder": settings.data_folder}
        return (
            f"Made by `{self.command}`. Each row is `python main.py "
            f"{shlex.join(words(flags))} --lr LR --seed SEED` with the flags of its last "
            f"column, then `test.py`, then `evaluation.py --metrics {' '.join(self.metrics)} "
            "--protocol clean` on all test images"
            f"{f' (LPIPS on the first {settings.num_test:,})' if fewer else ''}."
        )

    def notes(self) -> str:
        """Seeds, learning rates, and what is missing."""
        settings, seeds = self.experiment.settings, ", ".join(map(str, self.seeds))
        several = len(self.seeds) > 1
        notes = [
            f"{settings.max_steps:,} steps; seed{'s' if several else ''} {seeds}"
            + (": mean ± sample standard deviation." if several else ".")
        ]
        if settings.within is not None:
            notes.append(
                f"Further seeds where PSNR is within {settings.within:g} dB of the best other "
                "family; the column says which."
            )
        elif any(set(row.seeds) != set(self.seeds) for row in self.rows):
            notes.append("Not every row has all of these seeds; the column says which.")
        chosen: dict[str, Sequence[Any]] = {
            "normalisation": settings.latent_norms,
            "learning rate": settings.lrs,
        }
        for name, values in chosen.items():
            if len(values) > 1:
                candidates = ", ".join(
                    f"{value:g}" if name[0] == "l" else value for value in values
                )
                notes.append(
                    f"The {name} is the one of {candidates} with the best validation PSNR of the "
                    "first seed, unless the contender has its own."
                )
        without = [row.name for row in self.rows if "lpips" not in row.figures]
        if without:
            of = "" if len(without) == len(self.rows) else f" of {', '.join(without)}"
            notes.append(f"LPIPS{of} was not measured.")
        if self.lacking:
            notes.append(f"{self.lacking} of {len(self.experiment.contenders)} are missing.")
        if self.failures:
            notes.append(f"Failed: {', '.join(line.split(':')[0] for line in self.failures)}.")
        return " ".join(notes)

    def content(self) -> dict[str, Any]:
        """The figures of each seed, and everything needed to get them again."""
        settings, all_flags = self.experiment.settings, self.experiment.all_flags
        return {
            "command": self.command,
            "steps": settings.max_steps,
            "seeds": self.seeds,
            "lrs": settings.lrs,
            "latent_norms": settings.latent_norms,
            "metrics": self.metrics,
            "images": settings.images,
            "lpips_pairs": settings.num_test,
            "rows": [
                {**asdict(row), "all_flags": all_flags(row.flags, row.lr)} for row in self.rows
            ],
            "codecs": [asdict(row) for row in self.codecs],
            "failures": self.failures,
        }
