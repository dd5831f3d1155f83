"""A checkpoint by the name that --model_name gives it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.checkpoints.checkpoint import Checkpoint, read_checkpoint
from utils.errors import UserError
from utils.files import inside


def read_named(output_folder: str, name: str | None, flags: Mapping[str, Any]) -> Checkpoint:
    """Open <output_folder>/models/<name> and check it against the model flags given."""
    if name is None:
        raise UserError("--model_name is missing: a checkpoint under <output_folder>/models")
    models, whole = Path(output_folder) / "models", Path(name).resolve()
    if not (models / name).is_file() and whole.is_file() and models.resolve() in whole.parents:
        relative = whole.relative_to(models.resolve())
        raise UserError(f"--model_name {name} is to be relative to {models}: give {relative}")
    path = inside(models, name, "--model_name")
    if (path / "best.pt").is_file():
        raise UserError(f"--model_name {name} is a folder: give {Path(name) / 'best.pt'}")
    return read_checkpoint(path, flags)
