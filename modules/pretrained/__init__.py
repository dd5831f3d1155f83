"""Trained models that come with the package: load_model takes their names.

Each is <name>.safetensors, with weights and configuration, and its card <name>.md. SHA256SUMS
lists the files; experiments/pretrained.py makes all of these.
"""

from __future__ import annotations

from pathlib import Path

from ..weights import CONFIG, SUFFIX, digests

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of these models."""
    return [file.removesuffix(SUFFIX) for file in digests(FOLDER)]


def find(name: str) -> Path | None:
    """Return the file of the model of this name, if there is one."""
    return FOLDER / f"{name}{SUFFIX}" if name in names() else None


def holds_model(path: Path) -> bool:
    """Return whether a path is a file, or the folder of an exported checkpoint or of diffusers."""
    return path.is_file() or (path / CONFIG).is_file()


def locate(name: str | Path) -> Path:
    """Return the path, if it holds a model, or else the file of the model of this name."""
    path = Path(name)
    return path if holds_model(path) else find(str(name)) or path


def listing() -> str:
    """Return a part of a message that lists the names; empty if there are none."""
    return f"; models that come with LooC: {', '.join(names())}" if names() else ""
