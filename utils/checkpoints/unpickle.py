"""Opening files of torch.save without executing anything."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from utils.errors import UserError, one_line


class Inert:
    """Stands for an object of no use here; takes whatever it would be built of, and drops it."""

    def __new__(cls, *_: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        """Nothing of an object is kept."""

    def __setstate__(self, state: Any) -> None:
        """Nor of its state."""


def read_pickle(subject: str, path: Path, inert: tuple[str, ...] = ()) -> Any:
    """The content of the file, in which Inert stands for all that begins with a name in inert.

    Raises UserError, beginning with the subject, where the file cannot be read, is damaged, or
    names anything else that PyTorch does not know to be harmless.
    """
    try:
        with path.open("rb"):
            pass  # of later errors, those of the system are of damaged files too
    except OSError as error:
        raise UserError(f"{subject} cannot be read: {error.strerror or one_line(error)}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_sums(path)
            with safe_globals(stand_ins(path, inert)):
                return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise whatever the decoder stumbled over
        if "weights_only" in str(error) or "Unsupported" in str(error):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            code = f"code when opened ({named[1]})" if named else "code when opened"
            reason = f"it would execute {code}, or is no checkpoint"
        else:
            reason = f"it is truncated or damaged ({type(error).__name__})"
        raise UserError(f"{subject} is refused: {reason}") from error


def stand_ins(
    path: Path, inert: tuple[str, ...]
) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What safe_globals wants: Inert, by every name in the file that begins like one in inert.

    Files that PyTorch wrote long ago are no zip files; none is found in them.
    """
    if not inert or not zipfile.is_zipfile(path):
        return []
    names = get_unsafe_globals_in_checkpoint(str(path))
    return [(Inert, name) for name in names if name.startswith(inert)]


def check_sums(path: Path) -> None:
    """Raise BadZipFile where an entry does not have its checksum, at which PyTorch does not look.

    Files that PyTorch wrote long ago are no zip files and have none.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
