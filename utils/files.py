"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.errors import UserError, one_line


@contextmanager
def whole_file(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to path when the block succeeds.

    The old file, if any, moves to previous, if given; a process that dies between the two renamings
    leaves only previous. Raises UserError naming the path where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave an empty file
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder beside path; it replaces path when the block succeeds."""
    temporary, retired = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        for left_over in (temporary, retired):  # of a killed run
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        readable = temporary.stat().st_mode & 0o666  # of the umask
        for file in temporary.rglob("*.safetensors"):  # its writer takes a private temporary file
            file.chmod(readable)
        if path.exists():
            path.rename(retired)
            temporary.rename(path)
            shutil.rmtree(retired)
        else:
            temporary.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left_overs(folder: Path) -> None:
    """Remove temporary files that a killed process left in the folder."""
    for left_over in folder.glob(".*.[0-9]*.tmp"):
        with suppress(OSError):
            left_over.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write content as indented JSON."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def writable_folder(path: Path, flag: str) -> Path:
    """Create the folder if necessary; raise UserError naming the flag if it is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{flag} {path} cannot be created: {reason}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} is not writable")
    return path


def inside(folder: Path, name: str, flag: str) -> Path:
    """Return folder / name; raise UserError if that is not inside the folder."""
    check_unicode(name, flag)
    path = folder / name
    if path.resolve() == folder.resolve():
        raise UserError(f"{flag} {name!r} is not a name")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{flag} {name!r} leaves the folder {folder}")
    return path


def check_unicode(name: str, flag: str) -> None:
    """Raise UserError for a name that is not UTF-8, which TensorBoard cannot write."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{flag} {name!r} is not UTF-8") from error
