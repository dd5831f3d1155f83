"""Timing of contenders that take turns, peak memory, and the printing of tables."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.tables import Table

SEED = 0


@dataclass(frozen=True)
class Times:
    """Seconds over several rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}–{self.most:.3g})"


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 7, slow: float = 5.0
) -> dict[str, Times]:
    """Time contenders in turn, after a first round that is not counted.

    For a contender that takes longer than `slow` seconds, the first round is the only one.
    """
    first = {name: timed(run) for name, run in contenders.items()}
    seconds = {name: [value] if value > slow else [] for name, value in first.items()}
    for _ in range(rounds):
        for name, run in contenders.items():
            if first[name] <= slow:
                seconds[name].append(timed(run))
    return {
        name: Times(statistics.median(values), min(values), max(values))
        for name, values in seconds.items()
    }


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Median over the rounds, after a first round that is not counted."""
    return interleaved({"": run}, rounds, slow=math.inf)[""].median


def timed(run: Callable[[], object]) -> float:
    finish_kernels()
    start = time.perf_counter()
    run()
    finish_kernels()
    return time.perf_counter() - start


def finish_kernels() -> None:
    """Wait for the GPU to finish its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_megabytes(run: Callable[[], object]) -> float:
    """Peak GPU memory of a call in MB, above what was allocated before it."""
    finish_kernels()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    finish_kernels()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_memory() -> float:
    """Peak resident memory of this process in GB."""
    # Not getrusage: its peak survives the exec of a child and would be the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def both_thread_counts() -> list[int]:
    """One thread, and as many as there are cores."""
    return sorted({1, os.cpu_count() or 1})


def seeded() -> None:
    torch.manual_seed(SEED)


def printed(tables: Iterable[Table]) -> list[Table]:
    """Print each table as soon as it is measured; return all."""
    found = []
    for table in tables:
        sys.stdout.write(table.markdown() + "\n\n")
        sys.stdout.flush()
        found.append(table)
    return found
