"""Tables of measurements, the Markdown pages that show them, and the machine they come from."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from utils.files import whole_file

PACKAGES = "torch faiss-cpu vector-quantize-pytorch numpy scikit-image lpips pillow"


@dataclass
class Table:
    """Rows of measurements under a title."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table in Markdown, under a heading; floats have three digits."""
        rows = [self.columns, ["---"] * len(self.columns), *self.rows]
        cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([f"### {self.title}", "", *lines])


def write_page(path: Path, title: str, *parts: str | Table) -> None:
    """Write a Markdown page of paragraphs and tables."""
    texts = [part.markdown() if isinstance(part, Table) else part for part in parts]
    with whole_file(path) as temporary:
        temporary.write_text("\n\n".join([f"# {title}", *texts]) + "\n")


def machine() -> dict[str, Any]:
    """Return what measurements depend on: processor, GPU, Python and packages."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES.split()},
    }


def machine_line(about: Mapping[str, Any], *details: str) -> str:
    """Describe a machine in one line, with details of how it was used."""
    hardware = (about["processor"], f"{about['cores']} cores", about["device"])
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"{', '.join([*hardware, *details])}, Python {about['python']}; {versions}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
