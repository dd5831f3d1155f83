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
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
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
    def name(self) -> str:
        steps, seed = self.flags["max_steps"], self.flags["seed"]
        return f"{self.contender.name}-steps{steps}-lr{self.lr:g}-seed{seed}"

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
    """Train unless that is done; record validation PSNR, seconds and seconds per step."""
    if trained(run) is not None:
        return
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
    seconds = children.run(log_file, "main.py", flags)
    training = {
        "validation_psnr": validation_psnr(run),
        "seconds": seconds,
        "seconds_per_step": seconds_per_step(run),
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
    """Reconstruct and measure the test images; keep the figures and remove the pictures."""
    if finished(run, settings) is not None:
        return
    data = DataConfig(run.flags["dataset"], settings.data_folder)
    results, log_file = run.folder / "best" / data.name, run.folder / "log.txt"
    pictures = results / "original", results / "rec"
    flags: Flags = {
        "output_folder": run.output,
        "model_name": f"{run.name}/best.pt",
        "data_folder": settings.data_folder,
        "num_workers": settings.threads,
        "batch_size": 64,
    }
    shutil.rmtree(results, ignore_errors=True)
    try:
        seconds = {"test": children.run(log_file, "test.py", flags)}
        start = time.perf_counter()
        metrics = evaluate(pictures, settings, partial(children.run, log_file, "evaluation.py"))
        seconds["evaluation"] = time.perf_counter() - start
    finally:
        for folder in pictures:
            shutil.rmtree(folder, ignore_errors=True)
    analysis = read_json(results / "analysis.json")
    training = read_json(run.folder / "run.json")["training"]
    result = {
        "flags": run.identity,
        "num_test": settings.num_test,
        "metrics": metrics,
        "rate": analysis["rate"],
        "codebook": analysis["codebook"],
        "training": training,
        "seconds": {"training": training["seconds"], **seconds},
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


@dataclass
class Contest:
    """The runs of one contender: one for each learning rate and seed."""

    contender: Contender
    runs: list[Run]

    def scores(self) -> dict[float, list[float]]:
        """Validation PSNR of the trained runs, by learning rate."""
        scores: dict[float, list[float]] = {}
        for run in self.runs:
            training = trained(run)
            if training is not None:
                scores.setdefault(run.lr, []).append(training["validation_psnr"])
        return scores

    def winners(self) -> list[Run]:
        """The trained runs of the best learning rate.

        That is the one with most trained seeds; among equals, the one with the highest mean
        validation PSNR.
        """
        scores = self.scores()
        if not scores:
            return []
        best = max(scores, key=lambda lr: (len(scores[lr]), statistics.mean(scores[lr])))
        return [run for run in self.runs if run.lr == best and trained(run) is not None]


# train or measure, and the run and contest that it is for
Task: TypeAlias = tuple[Callable[[Run, Settings, Children], None], Run, Contest]


def contests(contenders: Iterable[Contender], settings: Settings) -> list[Contest]:
    """The runs of each contender. One that names its learning rate has no other."""
    found = []
    for contender in contenders:
        flags = {**settings.flags, **contender.flags}
        lrs = () if "lr" in contender.flags else settings.lrs
        rates: list[Flags] = [{"lr": lr} for lr in lrs] or [{}]
        whole = [{**flags, "seed": seed, **rate} for rate in rates for seed in settings.seeds]
        runs = [Run(contender, flags, settings.output, settings.images) for flags in whole]
        found.append(Contest(contender, runs))
    return found


def run_all(found: Sequence[Contest], settings: Settings) -> list[str]:
    """Train all runs and measure the winners, settings.jobs at a time; return the failures.

    A contender is measured as soon as its last training has ended.
    """
    children = Children(settings.threads)
    failures: list[str] = []
    waiting: deque[Task] = deque((train, run, contest) for contest in found for run in contest.runs)
    running: dict[Future[None], Task] = {}
    with (
        progress(len(waiting) + len(found) * len(settings.seeds), "task") as bar,
        ThreadPoolExecutor(settings.jobs) as pool,
        stopping(children),
    ):
        while waiting or running:
            while waiting and len(running) < settings.jobs:
                work, run, contest = waiting.popleft()
                running[pool.submit(work, run, settings, children)] = work, run, contest
            names = (f"{run.name} ({work.__name__})" for work, run, _ in running.values())
            bar.set_postfix_str(", ".join(names), refresh=sys.stderr.isatty())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                work, run, contest = running.pop(future)
                bar.update()
                if error := future.exception():
                    known = isinstance(error, (Failure, UserError))
                    kind = "" if known else f"{type(error).__name__}: "
                    failures.append(f"{run.name}: {kind}{one_line(error)}")
                    log.warning("failed: %s", failures[-1])
                others = [item for item in (*waiting, *running.values()) if item[2] is contest]
                if work is train and not others:
                    winners = reversed(contest.winners())
                    waiting.extendleft((measure, run, contest) for run in winners)
    return failures
