"""Downloads and unpacking by torchvision: without output, and completely or not at all."""

from __future__ import annotations

import io
import socket
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from utils.errors import UserError, one_line
from utils.logger import log

TIMEOUT = 20.0  # seconds without an answer after which a download has failed
REASON_LENGTH = 200  # characters


def fetch(
    build: Callable[[str], object], folder: Path, missing: str, archives: Sequence[str] = ()
) -> None:
    """Let build(path) make a data set in an empty folder, then move it into folder.

    Archives of these names that folder holds already are linked there first. Raises UserError,
    `missing` and the reason in one line; then folder is as it was.
    """
    try:
        with quiet(), staged(folder, archives) as temporary:
            build(str(temporary))
    except MemoryError:
        raise
    except Exception as error:  # sockets, tar, zip, gdown and torchvision each raise their own
        reason = textwrap.shorten(one_line(error), REASON_LENGTH, placeholder=" …")
        raise UserError(f"{missing}, and getting it failed: {reason}") from error
    log.info("the data set is in %s", folder)


@contextmanager
def staged(folder: Path, archives: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder on the same disk; move its content when the block succeeds."""
    folder = folder.absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.is_dir())
    with TemporaryDirectory(prefix=".looc-", dir=nearest) as name:
        temporary = Path(name)
        for archive in archives:
            if (folder / archive).is_file():
                (temporary / archive).parent.mkdir(parents=True, exist_ok=True)
                (temporary / archive).symlink_to(folder / archive)
        yield temporary
        move_into(temporary, folder)


def move_into(source: Path, target: Path) -> None:
    """Move everything but links from one folder into another, which keeps its other files."""
    target.mkdir(parents=True, exist_ok=True)
    for item in sorted(source.iterdir()):
        if item.is_dir() and (target / item.name).is_dir():
            move_into(item, target / item.name)
        elif not item.is_symlink():
            item.replace(target / item.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, and limit the wait for a silent server."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)
