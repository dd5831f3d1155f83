"""Run the experiments of a suite within a budget, and write a page of what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from experiments.children import Children
from experiments.options import Contender, Settings
from experiments.page import Experiment, Extras
from experiments.runs import Run, finished, read_json, trained
from experiments.tables import Row
from utils.checkpoints.checkpoint import read_checkpoint
from utils.errors import UserError
from utils.logger import log
from utils.tables import Table, write_page

ABOUT = """\
Contenders that have no result yet. Core-hours are those of the training steps that are left, at the
median speed of the contender's runs in the same folder, else of all runs there. Further seeds that
`--within` asks for count once it is known who is close."""


def run_experiments(
    experiments: Sequence[Experiment],
    selected: Sequence[Contender],
    children: Children,
    extras: Callable[[Experiment, list[Row]], Extras] = lambda *_: ({}, ()),
) -> int:
    """Run experiments of one suite one after another; return the exit code.

    That they end for lack of time is no failure.
    """
    settings, failures = experiments[0].settings, []
    for experiment in experiments:
        failures += experiment.run(selected, children, partial(extras, experiment))
    name = experiments[0].page.replace(f"-{settings.max_steps}", "")
    write_missing(settings.docs / f"{name}-missing.md", experiments, selected)
    return 1 if failures else 0


def write_missing(
    path: Path, experiments: Sequence[Experiment], selected: Sequence[Contender]
) -> None:
    """Write the page and log its sum; where nothing is missing, remove it."""
    table = Table("Left", ["", "steps", "trainings", "core-hours"])
    trainings, hours, unknown = 0, 0.0, False
    for experiment in experiments:
        settings = experiment.settings
        for contest in experiment.planned(selected):
            left = [run for run in contest.runs() if not trained(run)]
            if not left and all(finished(run, settings) for run in contest.winners()):
                continue
            speed = seconds_per_step(contest.contender, settings)
            steps = sum(settings.max_steps - steps_done(run) for run in left)
            needed = None if speed is None else steps * speed * settings.threads / 3600
            cells = [
                f"{len(left)}" if left else "only to measure",
                "?" if needed is None else needed,
            ]
            table.rows.append([contest.contender.name, f"{settings.max_steps:,}", *cells])
            trainings, hours = trainings + len(left), hours + (needed or 0.0)
            unknown = unknown or needed is None
    path.unlink(missing_ok=True)
    if table.rows:
        known = "?" if unknown else f"{hours:.1f}"
        sum_up = f"results {len(table.rows)}, trainings {trainings}, core-hours {known}"
        write_page(path, "What is missing", f"In all: {sum_up}.", ABOUT, table)
        log.info("missing: %s (%s); the same command goes on", sum_up, path)


def seconds_per_step(contender: Contender, settings: Settings) -> float | None:
    """Median speed of a contender's runs, else of all runs in the folder, None without any."""
    folder = settings.output / "results"
    for name in (f"{contender.name}-steps", ""):
        records = [read_json(path) for path in folder.glob(f"{name}*/run.json")]
        speeds: list[float] = [
            record["training"]["seconds_per_step"] for record in records if "training" in record
        ]
        if speeds:
            return statistics.median(speeds)
    return None


def steps_done(run: Run) -> int:
    """The steps of a half-done training with these flags."""
    last = run.checkpoint.with_name("last.pt")
    if read_json(run.folder / "run.json").get("flags") != run.identity or not last.exists():
        return 0
    try:
        return read_checkpoint(last).count("step")
    except UserError:  # it is damaged: the run goes on from previous.pt
        return 0
