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


def start_logging(file: Path | None = None) -> None:
    """Send log lines to the screen and, where given, append them with their time to a file."""
    log.setLevel(logging.INFO)
    log.handlers.clear()
    log.addHandler(BarHandler())
    if file is not None:
        handler = logging.FileHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
