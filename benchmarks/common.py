"""Interleaved timing, and tables with the machine they were measured on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SEED = 0
PACKAGES = (
    "torch",
    "faiss-cpu",
    "vector-quantize-pytorch",
    "numpy",
    "scikit-image",
    "lpips",
    "pillow",
)


@dataclass
class Table:
    """Rows of measurements under a title; cells are text or seconds as (median, min, max)."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        for row in (self.columns, ["---"] * len(self.columns), *self.rows):
            lines.append("| " + " | ".join(map(cell, row)) + " |")
        return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, Times):
        return f"{value.median:.3g} ({value.least:.3g}–{value.most:.3g})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Times:
    """Seconds over several rounds."""

    median: float
    least: float
    most: float


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 7, slow: float = 5.0
) -> dict[str, Times]:
    """Time contenders in turn, after a round that is not counted.

    One that took longer than `slow` seconds in that round is not timed again.
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


def timed(run: Callable[[], object]) -> float:
    finish_kernels()
    start = time.perf_counter()
    run()
    finish_kernels()
    return time.perf_counter() - start


def finish_kernels() -> None:
    """Wait for what the GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_megabytes(run: Callable[[], object]) -> float:
    """What a call allocates on the GPU at a time, above what is there before it."""
    finish_kernels()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    finish_kernels()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "python": platform.python_version(),
        "seed": SEED,
        "versions": {name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def both_thread_counts() -> list[int]:
    """One, and all."""
    return sorted({1, os.cpu_count() or 1})


def seeded() -> None:
    torch.manual_seed(SEED)
