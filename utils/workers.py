"""Worker processes of a DataLoader: their signals, their end, and errors that they cause."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from torch.utils.data import DataLoader

from utils.errors import UserError, limit_reached
from utils.training.signals import SIGNALS

Item = TypeVar("Item")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h

# --num_workers is the user's choice, and more than the cores may suit a slow disk.
warnings.filterwarnings("ignore", "This DataLoader will create")


def from_workers(loader: DataLoader[Item], num_workers: int) -> Iterator[Item]:
    """Iterate a loader. Raises UserError where its workers die or meet a limit of the machine."""
    try:
        yield from loader
    except ImportError as error:
        if not str(error).startswith("Caught"):  # then the worker has sent a traceback as text
            raise
        raise UserError(f"an import fails: {str(error).strip().splitlines()[-1]}") from error
    except (OSError, RuntimeError) as error:
        reached = limit_reached(error)
        if reached is None:
            raise
        raise UserError(f"--num_workers {num_workers}: {reached}") from error


def start_worker(_number: int) -> None:
    """Leave signals and messages to the main process, which ends and reports its workers.

    If that is killed, they are too: with a full pipe that nobody reads they would wait for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def end_workers() -> None:
    """Kill the remaining workers: multiprocessing would wait, as they ignore SIGTERM."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which a DataLoader would report it
    for worker in workers:
        worker.kill()


atexit.register(end_workers)  # runs before multiprocessing's own handler
