"""Safe opening of files of weights, for the scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules import weights
from utils.errors import UserError


def read_weights(subject: str, path: Path, inert: tuple[str, ...] = ()) -> Mapping[Any, Any]:
    """Read a file of weights as modules.weights does; raise UserError where that is refused."""
    try:
        return weights.read_weights(subject, path, inert)
    except ValueError as error:
        raise UserError(str(error)) from error
