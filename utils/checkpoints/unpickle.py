"""Safe opening of files written by torch.save."""

from __future__ import annotations

import re
import warnings
import zipfile
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
            ignored: list[Any] = []
            if zipfile.is_zipfile(path):  # files of old versions of PyTorch are not
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:  # PyTorch does not verify checksums
                        raise zipfile.BadZipFile
                names = get_unsafe_globals_in_checkpoint(str(path)) if inert else []
                ignored = [(Inert, name) for name in names if name.startswith(inert)]
            with safe_globals(ignored):
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
