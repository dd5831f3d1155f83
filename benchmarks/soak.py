"""Measure memory, handles, threads and speed of the scripts under load: python -m benchmarks.soak.

A leak shows as a slope that stays clearly above zero to the end. A run that fails raises
RuntimeError.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.evaluation import small_picture
from benchmarks.measure import printed
from datasets import open_dataset, split_validation
from utils.errors import run
from utils.flags.arguments import Parser
from utils.tables import Table, machine, machine_line, write_page

ROOT = Path(__file__).parent.parent
INTERVAL = 0.5  # seconds between two samples of a long run
BRIEF = 0.1  # seconds between two samples of a short run
WARM_UP = 0.1  # share of the steps that is left out
SHARES = (0.25, 0.5, 0.75)  # of the steps, shown besides the first and the last
DISTINCT = 400  # images; more are hard links to these
TINY = (
    *("--dataset", "folder", "--image_size", "8", "--device", "cpu", "--num_workers", "2"),
    *("--hidden_size", "8", "--num_residual_hidden", "8", "--num_embedding", "16"),
    *("--exp_name", "soak"),
)
ABOUT = """\
Made by `make soak`: the scripts under load, observed from outside.

Training is main.py with a model of 8 channels and K = 16 on images of 8×8, one thread, 2 workers
for training and 2 for validation. The long run has batch 8, some 50 validations and a checkpoint
every 500 steps besides. Image files are hard links to 400 pictures, their names in the system's
cache.

Memory is resident memory; pages that processes share are counted in each. Standard errors assume
independent samples, which these are not. A leak grows steadily; a single jump is no leak."""


# ------------------------------------------------------------------------------- watching a process


class Usage(NamedTuple):
    """Memory, handles and threads of one or more processes; shared pages are counted in each."""

    memory: float  # resident, MB
    peak: float  # the most memory so far, MB
    handles: float
    threads: float


NOTHING = Usage(0, 0, 0, 0)


class Sample(NamedTuple):
    """Usage of a script and its workers at one time."""

    time: float  # seconds since the epoch
    script: Usage
    workers: Usage


class Watched(NamedTuple):
    """A run that has ended well."""

    start: float  # seconds since the epoch
    seconds: float
    samples: list[Sample]

    def busy(self) -> list[Sample]:
        """Samples taken while workers lived: the exit touches all libraries once more."""
        return [sample for sample in self.samples if sample.workers.memory]

    def peaks(self) -> tuple[float, float]:
        """Peak memory in MB of the script and of its workers together, before its exit."""
        busy = self.busy()
        return (
            max(sample.script.peak for sample in busy),
            max(sample.workers.peak for sample in busy),
        )


def watch(
    command: Sequence[str], interval: float, more: Mapping[str, str] | None = None
) -> Watched:
    """Run a Python script and sample it every `interval` seconds until it ends.

    more: environment variables to add. Raises RuntimeError with the end of its output if it fails.
    """
    samples = []
    start = time.time()
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=output, stderr=output,
            env={**os.environ, **(more or {})},
        ) as child,
    ):  # fmt: skip
        try:
            while child.poll() is None:
                script = usage(child.pid)
                if script is not None:
                    samples.append(Sample(time.time(), script, workers_usage(child.pid)))
                time.sleep(interval)
        finally:
            child.terminate()  # an interrupted run must not leave it behind
        seconds = time.time() - start
        if child.returncode != 0:
            output.seek(0)
            end = output.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {end}")
    return Watched(start, seconds, samples)


def usage(pid: int) -> Usage | None:
    """Usage of a process; None if it has ended."""
    process = Path("/proc") / str(pid)
    try:
        status = read_status((process / "status").read_text())
        handles = len(os.listdir(process / "fd"))  # noqa: PTH208, no Path for each
    except OSError:
        return None
    if "VmRSS" not in status:  # ended, and not yet waited for
        return None
    kilobytes = status["VmRSS"], status["VmHWM"]
    memory, peak = (value * 1024 / 1e6 for value in kilobytes)
    return Usage(memory, peak, handles, status["Threads"])


def read_status(text: str) -> dict[str, int]:
    """Numbers in /proc/<pid>/status."""
    return {name: int(value) for name, value in re.findall(r"(?m)^(\w+):\s+(\d+)", text)}


def workers_usage(pid: int) -> Usage:
    """Usage of all descendants of a process together."""
    usages = [usage(worker) for worker in descendants(pid)]
    return Usage(*map(sum, zip(NOTHING, *(found for found in usages if found is not None))))


def descendants(pid: int) -> Iterator[int]:
    """Yield the children of a process, their children, and so on."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in map(int, children):
            yield child
            yield from descendants(child)


# ------------------------------------------------------------------------------------- the figures


class Steps(NamedTuple):
    """Steps of a run and the times at which they were logged to TensorBoard."""

    number: NDArray[np.float64]  # (n,), ascending
    time: NDArray[np.float64]  # (n,), seconds since the epoch

    def at(self, times: Sequence[float]) -> NDArray[np.float64]:
        """Step at each time."""
        return np.interp(times, self.time, self.number)

    def speed(self, first: float, last: float) -> float:
        """Steps per second between two shares, in [0, 1], of the steps after the warm-up."""
        shares = WARM_UP + (1 - WARM_UP) * np.array([first, last])
        numbers = shares * self.number[-1]
        seconds = np.interp(numbers, self.number, self.time)
        return float(np.diff(numbers)[0] / np.diff(seconds)[0])


def read_steps(logs: Path) -> Steps:
    """Read the steps of a run from its TensorBoard folder."""
    board = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    events = board.Scalars("train/loss")
    return Steps(
        np.array([event.step for event in events], float),
        np.array([event.wall_time for event in events]),
    )


def slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Least-squares slope of y over x, both (n,), and its standard error for independent errors.

    Raises ValueError for fewer than three points.
    """
    if len(x) < 3:
        raise ValueError(f"{len(x)} samples are too few for a slope: the run was too short")
    dx, dy = x - x.mean(), y - y.mean()  # not np.polyfit: a constant has a slope of exactly 0
    spread = (dx**2).sum()
    value = (dx * dy).sum() / spread
    residuals = dy - value * dx
    return float(value), math.sqrt((residuals**2).sum() / (len(x) - 2) / spread)


def growth(steps: Steps, samples: list[Sample]) -> Table:
    """Usage of the script and its workers over the steps after the warm-up."""
    shares = np.array([WARM_UP, *SHARES, 1])
    numbers = steps.at([sample.time for sample in samples]) / steps.number[-1]
    inside = [
        (number, sample)
        for number, sample in zip(numbers, samples)
        if number >= WARM_UP and sample.time <= steps.time[-1]
    ]
    x = np.array([number for number, _ in inside])
    nearest = np.abs(x - shares[:, None]).argmin(1)
    table = Table(
        f"Memory, handles and threads over {steps.number[-1]:,.0f} steps",
        [
            *("", *(f"step {share * steps.number[-1]:,.0f}" for share in shares)),
            *("least", "most", "slope per 1,000 steps", "the same in the last half"),
        ],
    )
    for field, label in (("memory", "memory, MB"), ("handles", "handles"), ("threads", "threads")):
        for who in ("script", "workers"):
            y = np.array([getattr(getattr(sample, who), field) for _, sample in inside], float)
            thousands, late = x * steps.number[-1] / 1000, x >= 0.5
            slopes = slope(thousands, y), slope(thousands[late], y[late])
            shown = *y[nearest], y.min(), y.max()
            table.rows.append(
                [
                    f"{who}: {label}",
                    *(f"{number:.5g}" for number in shown),
                    *(f"{value:+.3f} ± {error:.3f}" for value, error in slopes),
                ]
            )
    return table


# ------------------------------------------------------------------------------------------- parts


def write_images(folder: Path, count: int, side: int, bits: int = 8) -> None:
    """Write small PNG files with so many bits per channel into 200 subfolders."""
    distinct: list[Path] = []
    for number in range(count):
        path = folder / f"{number % 200:03d}" / f"{number:06d}.png"
        if number < DISTINCT:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = small_picture(number).resize((side, side)).convert("RGB")
            ImageOps.posterize(picture, bits).save(path)
            distinct.append(path)
        else:
            path.hardlink_to(distinct[number % DISTINCT])


def train(folder: Path, images: Path, interval: float, *flags: object) -> tuple[Watched, Steps]:
    """Run main.py with a tiny model."""
    command = ["main.py", *TINY, "--data_folder", images, "--output_folder", folder, *flags]
    # More threads would not speed up so small a model and would compete with the workers.
    run = watch([*map(str, command)], interval, {"OMP_NUM_THREADS": "1"})
    return run, read_steps(folder / "logs" / "soak")


def long_run(quick: bool) -> Iterator[Table]:
    """20,000 steps with some 50 validations and 40 more checkpoints."""
    num_steps, num_images, save_every = (1000, 200, 25) if quick else (20_000, 4000, 500)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", num_images, 8)
        flags = "--batch_size", 8, "--max_steps", num_steps, "--save_every", save_every
        run, steps = train(folder, folder / "images", INTERVAL, *flags)
    yield growth(steps, run.samples)
    early, late = steps.speed(0, 0.25), steps.speed(0.75, 1)
    table = Table(
        f"Steps per second in the same run, its first {WARM_UP:.0%} left out",
        ["whole run, s", "first quarter", "last quarter", "ratio"],
    )
    table.rows.append([f"{run.seconds:.0f}", early, late, late / early])
    yield table


def large_folder(quick: bool) -> Iterator[Table]:
    """Open a folder of 200,000 images and train 50 steps on it; the same with a twentieth."""
    table = Table(
        "A folder of tiny images in 200 subfolders, 50 steps of batch 64, 2 workers",
        [
            *("images", "list and split, s", "main.py until step 1, s", "until step 50, s"),
            *("until its end, s", "peak MB", "peak MB of its workers together"),
        ],
    )
    for count in (500, 10_000) if quick else (10_000, 200_000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            images = folder / "images"
            write_images(images, count, 8)
            start = time.perf_counter()
            split_validation(open_dataset("folder", str(images), "train", 8))
            seconds = time.perf_counter() - start
            flags = "--batch_size", 64, "--max_steps", 50, "--log_every", 1
            run, steps = train(folder, images, BRIEF, *flags)
        reached = [float(moment - run.start) for moment in (steps.time[0], steps.time[-1])]
        peaks = [f"{peak:.0f}" for peak in run.peaks()]
        table.rows.append([f"{count:,}", seconds, *reached, run.seconds, *peaks])
    yield table


def many_pairs(quick: bool) -> Iterator[Table]:
    """evaluation.py over 5,000 and 20,000 pairs."""
    count = 1000 if quick else 20_000
    table = Table(
        "evaluation.py (L1, SSIM, PSNR), 32×32, start-up included",
        [
            *("pairs", "seconds", "pairs/s", "MB when half is measured", "MB at the last"),
            *("peak MB", "peak MB of its workers together"),
        ],
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "original", count, 32)
        write_images(folder / "rec", count, 32, bits=3)
        command = [
            *("evaluation.py", "--metrics", "l1", "ssim", "psnr", "--device", "cpu"),
            *("--gt_path", str(folder / "original"), "--g_path", str(folder / "rec")),
        ]
        part = count // 4
        for number, limit in ((part, ["--num_test", str(part)]), (count, [])):
            run = watch([*command, *limit], BRIEF)
            busy = [sample.script.memory for sample in run.busy()]
            held = [f"{value:.0f}" for value in (busy[len(busy) // 2], busy[-1], *run.peaks())]
            speed = f"{number / run.seconds:.0f}"
            table.rows.append([f"{number:,}", run.seconds, speed, *held])
    yield table


PARTS = {"steps": long_run, "folder": large_folder, "evaluation": many_pairs}


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the sizes")
    parser.add_argument("--output", type=Path, help="page to write besides")
    arguments = parser.parse_args()
    parts = arguments.parts or PARTS
    tables = printed(table for part in parts for table in PARTS[part](arguments.quick))
    if arguments.output is not None:
        write(arguments.output, tables)


def write(path: Path, tables: list[Table]) -> None:
    write_page(path, "Soak", ABOUT, f"{machine_line(machine())}.", *tables)


if __name__ == "__main__":
    run(main)
