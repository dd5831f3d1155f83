"""Safe opening of files written by torch.save."""

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
    """Stand-in for an object that is ignored; accepts any content and drops it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_pickle(subject: str, path: Path, inert: tuple[str, ...] = ()) -> Any:
    """Read a file; objects whose name begins with an entry of `inert` become Inert.

    Raises UserError, beginning with the subject, if the file cannot be read, is damaged, or
    contains any other object that PyTorch does not consider safe.
    """
    try:
        with path.open("rb"):
            pass  # later errors of the system may be due to damaged content
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
    except Exception as error:  # damaged files raise errors of many types
        if "weights_only" in str(error) or "Unsupported" in str(error):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            code = f"code when opened ({named[1]})" if named else "code when opened"
            reason = f"it would execute {code}, or is not a checkpoint"
        else:
            reason = f"it is truncated or damaged ({type(error).__name__})"
        raise UserError(f"{subject} is refused: {reason}") from error


def stand_ins(
    path: Path, inert: tuple[str, ...]
) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Map every name in the file that begins with an entry of `inert` to Inert, for safe_globals.

    Files of old versions of PyTorch are not zip files; no names are found in them.
    """
    if not inert or not zipfile.is_zipfile(path):
        return []
    names = get_unsafe_globals_in_checkpoint(str(path))
    return [(Inert, name) for name in names if name.startswith(inert)]


def check_sums(path: Path) -> None:
    """Raise BadZipFile if an entry does not match its checksum, which PyTorch does not verify.

    Files of old versions of PyTorch are not zip files and have no checksums.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
