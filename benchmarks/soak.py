"""The scripts under load, what they hold and how fast they are: python -m benchmarks.soak.

A leak shows as a slope clearly above zero to the end. A run that does not end well raises
RuntimeError.
"""

from __future__ import annotations

import argparse
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

from benchmarks.common import Table, machine
from benchmarks.evaluation import small_picture
from datasets import open_dataset, split_validation
from utils.files import whole_file

ROOT = Path(__file__).parent.parent
INTERVAL = 0.5  # seconds between two samples of a long run
BRIEF = 0.1  # and of a short one
WARM_UP = 0.1  # of the steps, left out
SHARES = (0.25, 0.5, 0.75)  # of the steps, at which a look is shown besides the first and last
DISTINCT = 400  # images; more are hard links to these
TINY = (
    *("--dataset", "folder", "--image_size", "8", "--device", "cpu", "--num_workers", "2"),
    *("--hidden_size", "8", "--num_residual_hidden", "8", "--num_embedding", "16"),
    *("--exp_name", "soak"),
)
ABOUT = """\
Made by `make soak`: the scripts under load, looked at from outside.

Training is main.py with a model of 8 channels and K = 16 on images of 8×8, one thread, 2 workers
for training and 2 for validation. The long run has batch 8, some 50 validations and a checkpoint
every 500 steps besides. Image files are hard links to 400 pictures, their names in the system's
cache.

Memory is resident memory; what processes share is counted in each. Standard errors take the
samples as independent, which they are not. A leak grows steadily; a single jump is none.
"""


# ------------------------------------------------------------------------------- watching a process


class Usage(NamedTuple):
    """What a process holds, or several together; pages they share are counted in each."""

    memory: float  # resident, MB
    peak: float  # the most memory so far, MB
    handles: float
    threads: float


NOTHING = Usage(0, 0, 0, 0)


class Sample(NamedTuple):
    """What a script and its workers hold at one time."""

    time: float  # seconds since the epoch
    script: Usage
    workers: Usage


class Watched(NamedTuple):
    """A run that has ended well."""

    start: float  # seconds since the epoch
    seconds: float
    samples: list[Sample]

    def busy(self) -> list[Sample]:
        """The samples at which workers lived: an exit touches all libraries once more."""
        return [sample for sample in self.samples if sample.workers.memory]

    def peaks(self) -> tuple[float, float]:
        """The most memory of the script and of its workers together, MB, before its exit."""
        busy = self.busy()
        return (
            max(sample.script.peak for sample in busy),
            max(sample.workers.peak for sample in busy),
        )


def watch(
    command: Sequence[str], interval: float, more: Mapping[str, str] | None = None
) -> Watched:
    """Run a Python script and sample it every so many seconds until it ends.

    more: environment variables besides those of this process. Raises RuntimeError with the end of
    its output where it fails.
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
            child.terminate()  # a run that is interrupted shall not leave it behind
        seconds = time.time() - start
        if child.returncode != 0:
            output.seek(0)
            end = output.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {end}")
    return Watched(start, seconds, samples)


def usage(pid: int) -> Usage | None:
    """What a process holds; None where it has ended."""
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
    """The numbers of /proc/<pid>/status."""
    return {name: int(value) for name, value in re.findall(r"(?m)^(\w+):\s+(\d+)", text)}


def workers_usage(pid: int) -> Usage:
    """What all processes below a process hold together."""
    usages = [usage(worker) for worker in descendants(pid)]
    return Usage(*map(sum, zip(NOTHING, *(found for found in usages if found is not None))))


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and that those have."""
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
    """The times at which TensorBoard was told of a run's steps."""

    number: NDArray[np.float64]  # (n,), ascending
    time: NDArray[np.float64]  # (n,), seconds since the epoch

    def at(self, times: Sequence[float]) -> NDArray[np.float64]:
        """The step at each time."""
        return np.interp(times, self.time, self.number)

    def speed(self, first: float, last: float) -> float:
        """Steps per second between two shares, in [0, 1], of the steps after the warm-up."""
        shares = WARM_UP + (1 - WARM_UP) * np.array([first, last])
        numbers = shares * self.number[-1]
        seconds = np.interp(numbers, self.number, self.time)
        return float(np.diff(numbers)[0] / np.diff(seconds)[0])


def read_steps(logs: Path) -> Steps:
    """The steps of a run from its TensorBoard folder."""
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
    dx, dy = x - x.mean(), y - y.mean()
    spread = (dx**2).sum()
    value = (dx * dy).sum() / spread
    residuals = dy - value * dx
    return float(value), math.sqrt((residuals**2).sum() / (len(x) - 2) / spread)


def growth(steps: Steps, samples: list[Sample]) -> Table:
    """What the script and its workers hold over the steps, from the end of the warm-up on."""
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
        f"What they hold in {steps.number[-1]:,.0f} steps",
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
    """PNG files in 200 subfolders: small pictures with so many bits a channel."""
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
    """A run of main.py with a tiny model."""
    command = ["main.py", *TINY, "--data_folder", images, "--output_folder", folder, *flags]
    # So small a model gains nothing by more threads, which would contend with the workers.
    run = watch([*map(str, command)], interval, {"OMP_NUM_THREADS": "1"})
    return run, read_steps(folder / "logs" / "soak")


def long_run(quick: bool) -> Iterator[Table]:
    """20,000 steps with some 50 validations, and 40 checkpoints besides theirs."""
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
    """Opening a folder of 200,000 images and 50 steps on it, against one of a twentieth."""
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the sizes")
    parser.add_argument("--output", type=Path, help="write the tables there too")
    arguments = parser.parse_args()
    tables: list[Table] = []
    for part in arguments.parts or PARTS:
        for table in PARTS[part](arguments.quick):
            sys.stdout.write(table.markdown() + "\n")
            sys.stdout.flush()
            tables.append(table)
    if arguments.output is not None:
        write(arguments.output, tables)


def write(path: Path, tables: list[Table]) -> None:
    """The tables in Markdown, with the machine."""
    about = machine()
    lines = [
        "# Soak",
        "",
        ABOUT,
        f"{about['processor']}, {about['cores']} cores, Python {about['python']}, "
        f"torch {about['versions']['torch']}.",
        "",
        *(table.markdown() for table in tables),
    ]
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
