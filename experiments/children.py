"""Run the scripts of this repository as child processes, and end them together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any, NoReturn, TypeAlias

from utils.errors import Stopped, printable
from utils.flags.command import words

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds that a child has to end once it is asked to
LAST = 1e6  # seconds to wait where there is no end
# Linux ends a child, which saves its state, with the thread that waits for it, even after SIGKILL.
FOLLOW = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
Flags: TypeAlias = Mapping[str, Any]


class Failure(Exception):
    """A run has failed; the message is one line."""


@dataclass
class Children:
    """The running scripts. Once they are stopped, no other starts.

    With a budget of hours there is time left until shortly before its end.
    """

    threads: int
    budget: float | None = None
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False
    lock: Lock = field(default_factory=Lock)
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        if self.budget is None:
            return LAST
        seconds = 3600 * self.budget
        ending = min(PATIENCE, seconds / 10)
        return max(0.0, self.start + seconds - ending - time.monotonic())

    def run(self, log_file: Path, script: str, flags: Flags) -> None:
        """Run a script of this repository to its end.

        Raises Failure with the last line it wrote.
        """
        command = [sys.executable, str(ROOT / script), *words(flags)]
        if sys.platform == "linux":
            command = [sys.executable, "-c", FOLLOW, *command]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TQDM_MININTERVAL": "30"}
        with log_file.open("ab") as file, self.lock:
            if self.stopped:
                raise Failure("interrupted")
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                start_new_session=True,  # so that Ctrl-C reaches it through `stop` alone
            )  # fmt: skip
            self.running.add(child)
        code = child.wait()
        with self.lock:
            self.running.discard(child)
        if self.stopped:
            raise Failure("interrupted")
        if code != 0:
            raise Failure(f"{script} ended with {code}: {last_line(log_file)} ({log_file})")

    def stop(self) -> None:
        """Ask all to end, so that main.py saves its state first; kill those that do not."""
        with self.lock:
            self.stopped = True
            children = list(self.running)
        for child in children:
            child.terminate()
        deadline = time.monotonic() + PATIENCE
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()


def last_line(log_file: Path) -> str:
    """The last line of a log that is not blank."""
    lines = log_file.read_text(errors="replace").splitlines()
    return printable(next((line for line in reversed(lines) if line.strip()), "no output"))


@contextmanager
def stopping(children: Children) -> Iterator[None]:
    """End the children before Ctrl-C or SIGTERM ends this process."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        raise Stopped(signal.Signals(number), "interrupted; the same command continues")

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except BaseException:
        children.stop()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
