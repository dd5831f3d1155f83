"""A request to stop: by the scheduler (SIGTERM) or by Ctrl-C (SIGINT)."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from utils.distributed import rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Inside this context the first signal is noted; the second has its usual effect."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self.signal = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = signal.Signals(number)
        self._restore()
        if rank() == 0:
            # Not by the logger, which may hold its lock right now.
            words = f"\n{self.signal.name}: stopping after this step (once more: at once)\n"
            os.write(2, words.encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
