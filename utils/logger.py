"""The scripts' logger, whose lines do not break the progress bar."""

from __future__ import annotations

import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

log = logging.getLogger("looc")


class Lines:
    """stderr where it is a file: each state of a progress bar is a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, unit: str, **options: Any) -> tqdm[NoReturn]:
    """Return a progress bar; where stderr is a file, it writes a line a minute."""
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 60, "maxinterval": 60}
    return tqdm(total=total, unit=unit, **options)


class BarHandler(logging.Handler):
    """Handler that writes above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@cache
def warn_once(message: str) -> None:
    """Warn, but not a second time in the same words."""
    log.warning("%s", message)


def start_logging(file: Path | None = None, *, quiet: bool = False) -> None:
    """Log to the screen and, with the time, to a file; if quiet, only errors."""
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    log.handlers.clear()
    log.addHandler(BarHandler())
    logging.raiseExceptions = False  # or a full disk prints a traceback for each line
    if file is not None:
        handler = logging.FileHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
