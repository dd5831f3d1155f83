"""A request to stop: by a scheduler, by Ctrl-C (SIGINT) or by a terminal that closes (SIGHUP)."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from utils.distributed import rank

TWICE_AT_ONCE = (signal.SIGTERM, signal.SIGINT)
# Slurm's --signal sends what the user names, often SIGUSR1 or SIGUSR2, which would kill.
SIGNALS = (*TWICE_AT_ONCE, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Inside this context the first signal is noted; a second SIGTERM or Ctrl-C ends at once.

    Signals that are ignored already, as SIGHUP is under nohup, stay so.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self.signal = None
        self._previous = {
            number: signal.signal(number, self._note)
            for number in SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None:  # terminals and schedulers may repeat themselves
            return
        self.signal = signal.Signals(number)
        for again in TWICE_AT_ONCE:
            if again in self._previous:
                signal.signal(again, self._previous[again])
        words = f"\n{self.signal.name}: stopping after this step (Ctrl-C or SIGTERM: at once)\n"
        try:  # not by the logger, which may hold its lock right now
            os.write(2, words.encode() if rank() == 0 else b"")
        except OSError:  # the terminal is gone, and every line would be an error
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
