"""Safe opening of files of weights."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .optional import require

CONFIG, TENSORS = "config.json", "model.safetensors"  # files of an exported checkpoint


class Inert:
    """Stand-in for an object that is ignored; accepts any content and drops it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_weights(subject: str, path: Path, inert: tuple[str, ...] = ()) -> Mapping[Any, Any]:
    """Read the dictionary in a file of torch.save or safetensors, without executing anything.

    The folder of an exported checkpoint is read as the checkpoint is. Objects whose name begins
    with an entry of `inert` become Inert. Raises ValueError, beginning with the subject, if the
    file cannot be read, is damaged, or contains any other object that PyTorch does not consider
    safe.
    """
    if is_exported(path):
        return read_exported(subject, path)
    if not path.is_file():
        folder = f"is a folder without {CONFIG} and {TENSORS}" if path.is_dir() else "is no file"
        raise ValueError(f"{subject} {folder if path.exists() else 'does not exist'}")
    try:
        with path.open("rb"):
            pass  # later errors of the system may be due to damaged content
    except OSError as error:
        raise ValueError(f"{subject} cannot be read: {error.strerror or error}") from error
    if path.suffix == ".safetensors":
        require("safetensors.torch", subject)
    try:
        content = read(path, inert)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        if "weights_only" in str(error) or "Unsupported" in str(error):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            code = f"code when opened ({named[1]})" if named else "code when opened"
            reason = f"it would execute {code}, or is not a checkpoint"
        else:
            reason = f"it is truncated or damaged ({type(error).__name__})"
        raise ValueError(f"{subject} is refused: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{subject} holds a {type(content).__name__}, not a state dict")
    return content


def is_exported(path: Path) -> bool:
    """Return whether a folder has the two files of an exported checkpoint."""
    return all((path / name).is_file() for name in (CONFIG, TENSORS))


def read_exported(subject: str, folder: Path) -> Mapping[Any, Any]:
    """Read the folder that `python -m utils.export` has written."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = type(error).__name__
        raise ValueError(f"{subject} has a {CONFIG} that is damaged ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{subject} has a {CONFIG} without settings")
    return {**content, "model": read_weights(subject, folder / TENSORS)}


def read(path: Path, inert: tuple[str, ...]) -> Any:
    if path.suffix == ".safetensors":
        return require("safetensors.torch", str(path)).load_file(path)
    ignored: list[Any] = []
    mapped = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if zipfile.is_zipfile(path):  # files of old versions of PyTorch are not
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # PyTorch does not verify checksums
                    raise zipfile.BadZipFile
                entries = archive.infolist()
            # Processes that read one file share its pages in memory.
            mapped = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            names = get_unsafe_globals_in_checkpoint(str(path)) if inert else []
            ignored = [(Inert, name) for name in names if name.startswith(inert)]
        with safe_globals(ignored):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
