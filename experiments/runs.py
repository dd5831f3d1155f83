"""Train and measure many models, each by main.py, test.py and evaluation.py.

A run has one name in models/, logs/ and results/ of the output folder. run.json records the flags
that it is trained with; result.json, written last, its figures. Finished work is not repeated for
the same flags, and an interrupted run continues.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from datasets.config import DataConfig
from experiments.children import Children, Failure, Flags, stopping
from experiments.options import PIXEL_METRICS, Contender, Settings
from utils.checkpoints.checkpoint import read_checkpoint
from utils.errors import UserError, one_line
from utils.files import write_json
from utils.flags.arguments import with_recipe
from utils.logger import log, progress
from utils.tables import machine
from utils.training.config import TrainConfig


@dataclass(frozen=True)
class Run:
    """One training of one contender."""

    contender: Contender
    flags: Flags  # all that decide the result
    output: Path
    images: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """The flags, those of the recipe, and the images, as stored in JSON."""
        whole = {**with_recipe(self.flags), "images": self.images}
        stored: dict[str, Any] = json.loads(json.dumps(whole))
        return stored

    @property
    def lr(self) -> float:
        return float(self.identity.get("lr", TrainConfig.lr))

    @property
    def norm(self) -> str | None:
        """The normalisation, if it is not the contender's own."""
        return None if "latent_norm" in self.contender.flags else self.flags.get("latent_norm")

    @property
    def name(self) -> str:
        steps, seed = self.flags["max_steps"], self.flags["seed"]
        words = [self.contender.name, f"steps{steps}", self.norm, f"lr{self.lr:g}", f"seed{seed}"]
        return "-".join(filter(None, words))

    @property
    def folder(self) -> Path:
        return self.output / "results" / self.name

    @property
    def checkpoint(self) -> Path:
        return self.output / "models" / self.name / "best.pt"


# -------------------------------------------------------------------------------------- one run


def trained(run: Run) -> dict[str, Any] | None:
    """The record of a finished training with these flags, or None."""
    state = read_json(run.folder / "run.json")
    whole = state.get("flags") == run.identity and run.checkpoint.exists()
    return state.get("training") if whole else None


def train(run: Run, settings: Settings, children: Children) -> None:
    """Train, or go on with it; record validation PSNR, seconds per step and core-hours of steps."""
    before = read_json(run.folder / "run.json").get("flags")
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "result.json").unlink(missing_ok=True)
    write_json(run.folder / "run.json", {"flags": run.identity})
    log_file = run.folder / "log.txt"
    log_file.write_bytes(b"")
    flags = {
        **run.flags,
        **settings.free_flags,
        "output_folder": run.output,
        "exp_name": run.name,
        "overwrite": before != run.identity,
    }
    children.run(log_file, "main.py", flags)
    speed = seconds_per_step(run)
    training = {
        "validation_psnr": validation_psnr(run),
        "seconds_per_step": speed,
        "core_hours": speed * run.flags["max_steps"] * settings.threads / 3600,
    }
    write_json(run.folder / "run.json", {"flags": run.identity, "training": training})
    for name in ("last.pt", "previous.pt"):
        run.checkpoint.with_name(name).unlink(missing_ok=True)


def validation_psnr(run: Run) -> float:
    """The validation PSNR of best.pt."""
    return float(read_checkpoint(run.checkpoint).content["best"])


def seconds_per_step(run: Run) -> float:
    """The median over the logged steps; the first, which includes compilation, is left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.output / "logs" / run.name)).Reload()
    speeds = [event.value for event in board.Scalars("train/images_per_second")]
    return float(run.flags["batch_size"] / statistics.median(speeds[1:] or speeds))


def measure(run: Run, settings: Settings, children: Children) -> None:
    """Reconstruct, code and measure the test images; keep the figures and remove the pictures."""
    data = DataConfig(run.flags["dataset"], settings.data_folder)
    results, log_file = run.folder / "best" / data.name, run.folder / "log.txt"
    pictures = results / "original", results / "rec"
    flags: Flags = {
        "output_folder": run.output,
        "model_name": f"{run.name}/best.pt",
        "data_folder": settings.data_folder,
        "num_workers": settings.threads,
        "batch_size": 64,
        "save_codes": run.flags.get("quantizer") != "none",
    }
    shutil.rmtree(results, ignore_errors=True)
    try:
        children.run(log_file, "test.py", flags)
        metrics = evaluate(pictures, settings, partial(children.run, log_file, "evaluation.py"))
    finally:
        for folder in pictures:
            shutil.rmtree(folder, ignore_errors=True)
    analysis = read_json(results / "analysis.json")
    result = {
        "flags": run.identity,
        "num_test": settings.num_test,
        "metrics": metrics,
        "rate": analysis["rate"],
        "codebook": analysis["codebook"],
        "training": read_json(run.folder / "run.json")["training"],
        "machine": {**machine(), "jobs": settings.jobs, "threads": settings.threads},
    }
    write_json(run.folder / "result.json", result)


def evaluate(
    pictures: tuple[Path, Path], settings: Settings, evaluation: Callable[[Flags], object]
) -> dict[str, float | None]:
    """Mean of each metric: LPIPS over the first num_test pairs, the others over all."""
    original, rec = pictures
    common: Flags = {
        "gt_path": original,
        "g_path": rec,
        "protocol": "clean",
        "num_workers": settings.threads,
        "weights_dir": settings.weights_dir,
    }
    apart = "lpips" in settings.metrics and settings.num_test is not None
    evaluation({**common, "metrics": PIXEL_METRICS if apart else settings.metrics})
    found = read_json(rec.parent / "metrics.json")["metrics"]
    if apart:
        lpips = rec.parent / "lpips"
        evaluation({**common, "metrics": ["lpips"], "num_test": settings.num_test, "output": lpips})
        found |= read_json(lpips / "metrics.json")["metrics"]
    return {name: score["mean"] for name, score in found.items()}


def finished(run: Run, settings: Settings) -> dict[str, Any] | None:
    """The result of a run with these flags and all metrics asked for, or None."""
    result = read_json(run.folder / "result.json")
    if result.get("flags") != run.identity or not set(settings.metrics) <= set(result["metrics"]):
        return None
    with_lpips = "lpips" in settings.metrics
    return None if with_lpips and result["num_test"] != settings.num_test else result


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------------- all runs


@dataclass(frozen=True)
class Contest:
    """The runs of one contender, some of which depend on how others end."""

    contender: Contender
    settings: Settings

    @property
    def choices(self) -> dict[str, Sequence[Any]]:
        """Flags that validation chooses, with candidates; without those of the contender."""
        asked = {"latent_norm": self.settings.latent_norms, "lr": self.settings.lrs}
        own = self.contender.flags
        return {name: values for name, values in asked.items() if values and name not in own}

    def run(self, seed: int, chosen: Flags) -> Run:
        flags = {**self.settings.flags, **self.contender.flags, **chosen, "seed": seed}
        return Run(self.contender, flags, self.settings.output, self.settings.images)

    def stages(self) -> Iterator[list[Run]]:
        """Runs to train one after another; what is chosen is known once a stage is trained.

        The first seed chooses the normalisation at the first learning rate, and with it the
        learning rate, by validation PSNR. All seeds are trained with both.
        """
        first = self.settings.seeds[0]
        chosen = {name: values[0] for name, values in self.choices.items()}
        for name, values in self.choices.items():
            runs = {value: self.run(first, {**chosen, name: value}) for value in values}
            yield [*runs.values()]
            done = {
                v: state["validation_psnr"] for v, run in runs.items() if (state := trained(run))
            }
            chosen[name] = max(done, key=lambda v: done[v], default=values[0])
        yield [self.run(seed, chosen) for seed in self.settings.seeds]

    def winners(self) -> list[Run]:
        """The trained runs with what was chosen so far, one for each seed."""
        *_, last = self.stages()
        return [run for run in last if trained(run)]

    def runs(self) -> list[Run]:
        """All runs, as far as is known; the number of them does not change."""
        return [*{run.name: run for stage in self.stages() for run in stage}.values()]


# train or measure, its run, and the position of the run's contest
Task: TypeAlias = tuple[Callable[[Run, Settings, Children], None], Run, int]


def contests(contenders: Iterable[Contender], settings: Settings) -> list[Contest]:
    return [Contest(contender, settings) for contender in contenders]


def run_all(found: Sequence[Contest], settings: Settings, children: Children) -> list[str]:
    """Train all runs and measure the winners, settings.jobs at a time; return the failures.

    A contender is measured as soon as its last training has ended. When the time of the children is
    over they are stopped; the same call goes on from there.
    """
    if not children.seconds_left:
        return []
    failures: dict[str, str] = {}
    stages = [contest.stages() for contest in found]

    def tasks(position: int) -> list[Task]:
        """The next trainings of a contest; after the last, its measurements."""
        for stage in stages[position]:
            left = [run for run in stage if not trained(run) and run.name not in failures]
            if left:
                return [(train, run, position) for run in left]
        unmeasured = (run for run in found[position].winners() if not finished(run, settings))
        return [(measure, run, position) for run in unmeasured]

    waiting: deque[Task] = deque(task for position in range(len(found)) for task in tasks(position))
    running: dict[Future[None], Task] = {}
    with (
        progress(len(waiting), "task") as bar,
        ThreadPoolExecutor(settings.jobs) as pool,
        stopping(children),
    ):
        while waiting or running:
            while waiting and len(running) < settings.jobs and children.seconds_left > 0:
                work, run, position = waiting.popleft()
                running[pool.submit(work, run, settings, children)] = work, run, position
            names = (f"{run.name} ({work.__name__})" for work, run, _ in running.values())
            bar.set_postfix_str(", ".join(names), refresh=sys.stderr.isatty())
            ended = wait(running, children.seconds_left, FIRST_COMPLETED).done
            if not ended:  # the time is over
                children.stop()
                break
            for future in ended:
                work, run, position = running.pop(future)
                bar.update()
                if error := future.exception():
                    known = isinstance(error, (Failure, UserError))
                    kind = "" if known else f"{type(error).__name__}: "
                    failures[run.name] = f"{run.name}: {kind}{one_line(error)}"
                    log.warning("failed: %s", failures[run.name])
                others = [task for task in (*waiting, *running.values()) if task[2] == position]
                if work is train and not others:
                    more = tasks(position)
                    waiting.extendleft(reversed(more))
                    bar.total = (bar.total or 0) + len(more)
    return [*failures.values()]
