"""TensorBoard's writer: of the first process alone, and on disks that may be full."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.distributed import rank
from utils.errors import UserError, one_line

OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class NoBoard:
    """Writer of all processes but the first; writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@contextmanager
def open_board(folder: Path, step: int) -> Iterator[SummaryWriter | NoBoard]:
    """TensorBoard's writer; entries that an interrupted run wrote after this step are hidden.

    Raises UserError naming the folder where it cannot be written.
    """
    if rank() > 0:
        yield NoBoard()
        return
    try:
        with SummaryWriter(str(folder), purge_step=step + 1 if step else 0) as board:
            yield board
    except OSError as error:
        if error.filename is not None or error.errno not in OF_DISKS:
            raise
        raise UserError(f"cannot write {folder}: {error.strerror or one_line(error)}") from error
