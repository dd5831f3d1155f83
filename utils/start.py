"""Errors and Ctrl-C while a script imports torch, which takes seconds; scripts import it first."""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

from utils.errors import fail, failed_import, run

__all__ = ["run"]


def interrupted(*_: object) -> None:
    """End at once: inside an import an exception could be swallowed, and nothing is lost yet."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())  # noqa: PTH119
    os._exit(128 + signal.SIGINT)


def failed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if reason := failed_import(error):
        fail(reason)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = failed
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
    signal.signal(signal.SIGINT, interrupted)  # until `run`
