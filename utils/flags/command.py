"""Command lines: kept as they were given, and written again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """A run of a script with the flags that were given, as checkpoints and results store it."""

    script: str = ""
    folder: str = ""  # where it was started
    flags: dict[str, Any] = field(default_factory=dict)
    num_processes: int = 1
    task: str = ""  # of generate.py: train or sample

    def line(self) -> str:
        """Return the line that runs it again."""
        start = ["python"]
        if self.num_processes > 1:
            start = ["torchrun", "--nproc_per_node", str(self.num_processes)]
        line = shlex.join([*start, self.script, *self.task.split(), *words(self.flags)])
        return f"cd {shlex.quote(self.folder)} && {line}"


def this_command(flags: Mapping[str, Any], num_processes: int = 1, task: str = "") -> Command:
    """Return the command of this process, from its parsed flags."""
    return Command(sys.argv[0], str(Path.cwd()), dict(flags), num_processes, task)


def words(flags: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line with these flags; those that are None are left out."""
    found = []
    for name, value in flags.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            found += [f"--{name}", *map(str, value)]
        elif str(value).startswith("-"):  # or it would be taken for a flag
            found.append(f"--{name}={value}")
        elif value is not None:
            found += [f"--{name}", str(value)]
    return found
