"""One logger for the scripts; its lines do not break the progress bar."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("looc")


class BarHandler(logging.Handler):
    """Writes above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start_logging(file: Path | None = None, *, quiet: bool = False) -> None:
    """Send log lines to the screen and, where given, append them with their time to a file.

    Where quiet, only errors are sent, and to the screen.
    """
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.handlers.clear()
    log.addHandler(BarHandler())
    logging.raiseExceptions = False  # a full disk shall not print a traceback a line
    if file is not None:
        handler = logging.FileHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
