"""Errors that the user can correct: one line on the screen, exit code 2, no traceback."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

PATIENCE = 5.0  # seconds that a process waits for the first one to report an error


class UserError(Exception):
    """An error the user can correct; its message is one line naming the flag or file."""


class Stopped(Exception):
    """A signal stopped the run, which has saved its state; the message says how to continue."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(message)
        self.number = number


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line."""
    return printable(str(error)) or type(error).__name__


def printable(text: str) -> str:
    """Return text on one line, with control and other unprintable characters escaped."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory of the host or of a device ran out."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def limit_reached(error: BaseException) -> str | None:
    """Return which limit of the machine caused an error, or that it ended a loader's worker."""
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        limit, option, what = resource.RLIMIT_NOFILE, "-n", "open files"
    elif number == errno.EAGAIN or "can't start new thread" in text:
        limit, option, what = resource.RLIMIT_NPROC, "-u", "processes and threads"
    elif text.startswith("DataLoader worker"):
        return f"{one_line(error).partition('. ')[0]} (out of memory or of processes)"
    else:
        return None
    most = resource.getrlimit(limit)[0]
    return f"too many {what} (ulimit {option}: {'unlimited' if most < 0 else most})"


def failed_import(error: BaseException) -> str | None:
    """Return which package cannot be imported and why, if that is what the error says."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "<module>" and not ours(name):
            return f"{name} cannot be imported: {type(error).__name__}: {one_line(error)[:200]}"
    if isinstance(error, ImportError) and error.name and not ours(error.name):
        return f"{error.name} cannot be imported: {one_line(error)[:200]}"
    return None


def ours(module: str) -> bool:
    """Return whether a module is of this repository."""
    name = module.partition(".")[0]
    root = Path(__file__).parents[1]
    return name == "__main__" or (root / name).is_dir() or (root / f"{name}.py").is_file()


@contextmanager
def memory_for(flags: str) -> Iterator[None]:
    """Raise a UserError naming the flags that determine memory use, if memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise UserError(f"{flags}: out of memory: {one_line(error)[:200]}") from error
        raise


def thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, but not TensorBoard's on a full disk: its next call raises it."""
    is_writer = type(failure.thread).__name__ == "_AsyncWriterThread"
    if not (is_writer and isinstance(failure.exc_value, OSError)):
        threading.__excepthook__(failure)


def unraisable(failure: sys.UnraisableHookArgs) -> None:
    """Print an error that nothing can catch, but not that of a loader whose workers never ran."""
    if "DataLoaderIter" not in repr(failure.object):
        sys.__unraisablehook__(failure)


def run(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError becomes one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths may hold bytes that are not text
        sys.stdout.reconfigure(errors="backslashreplace")
    threading.excepthook = thread_failed
    sys.unraisablehook = unraisable
    if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == "utils.start":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        fail(one_line(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of the output has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        if reached := limit_reached(error):
            fail(f"{reached}; try --num_workers 0")
        fail(f"{error.filename or 'input or output'}: {error.strerror or one_line(error)}")
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            fail(f"out of memory: {one_line(error)}")
        if reached := limit_reached(error):
            fail(f"{reached}; try --num_workers 0")
        if lost_connection(error):
            fail(f"another process has ended or cannot be reached: {one_line(error)[:200]}")
        if reason := failed_import(error):
            fail(reason)
        raise
    except Stopped as stop:
        end(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        end("interrupted", 128 + signal.SIGINT)
    except Exception as error:
        if reason := failed_import(error):
            fail(reason)
        raise


def fail(message: str) -> NoReturn:
    """End with one line and exit code 2.

    Of several processes all but the first wait a little: usually the first reports the same error,
    and torchrun then ends them all.
    """
    rank = int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    if rank > 0:
        time.sleep(PATIENCE)
        message = f"process {rank}: {message}"
    end(f"error: {printable(message)}", 2)


def end(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")
    sys.exit(code)


def lost_connection(error: BaseException) -> bool:
    """Return whether torch.distributed no longer reaches another process."""
    return type(error).__name__.startswith("Dist") or any(
        words in str(error) for words in ("Connection closed by peer", "Connection reset", "gloo")
    )
