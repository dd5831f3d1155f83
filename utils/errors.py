"""The user's mistakes: one line on the screen, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user can put right; its message is one line naming the flag or file."""


def unknown_name(flag: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is in no registry, with the nearest choice."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(known)}"
    return f"{flag} {name} is unknown; {hint}"


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device ran out."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def run(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError becomes one line and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {one_line(error)}\n")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: out of memory: {one_line(error)}\n")
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: interrupted\n")
        sys.exit(130)
