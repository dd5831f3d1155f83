"""One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from utils.distributed import rank
from utils.errors import UserError, one_line, printable
from utils.files import remove_left_overs, writable_folder
from utils.logger import log

LOCK = ".lock"
TAKEN = (errno.EAGAIN, errno.EACCES)


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Create the folder and keep other runs out of it until the block, or this process, ends.

    Of several processes the first one holds the lock, and removes temporary files of a killed run.
    Raises UserError naming the folder and the process that holds it; flag is the one by which to
    choose another folder.
    """
    if rank() > 0:
        yield
        return
    with take_lock(writable_folder(folder, flag), flag) as file:
        remove_left_overs(folder)
        try:
            note_holder(file, flag)
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()  # a refused run leaves no empty folder


def take_lock(folder: Path, flag: str) -> TextIO:
    """Lock the folder's file and return it, open."""
    while True:
        try:
            file = (folder / LOCK).open("a+")
        except FileNotFoundError:  # a run that has just ended left nothing in it
            folder.mkdir(parents=True, exist_ok=True)
            continue
        try:
            # Unlike those of flock, these locks do not pass to workers, which may outlive a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                file.seek(0)
                holder = printable(file.read(200)) or "another process"
                raise UserError(
                    f"{flag} {folder} is in use by {holder}; wait until that ends, "
                    f"or choose another {flag}"
                ) from error
            log.warning(
                "%s cannot be locked (%s): start no second run in it", folder, one_line(error)
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                break
        file.close()  # its holder has just ended and removed it
    return file


def note_holder(file: TextIO, flag: str) -> None:
    """Write this process into its lock. Raises UserError naming it, as on a full disk."""
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{flag}: cannot write {file.name}: {reason}") from error
